"""A test of DP-SGD itself that it can fail: frozen parameters, worst-case examples, thousands of independent draws."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train.callbacks._callback import Callback
from robust_train.callbacks._checks import check_counts
from robust_train.callbacks._inner import quiet
from robust_train.callbacks.dp_sgd import DPSGD
from robust_train.evasion.randomness import preserved_rng
from robust_train.privacy import accounting
from robust_train.privacy.canaries import (
    REJECTED,
    sampling_p_value,
    statistics,
    two_sample_bound,
    two_sample_ceiling,
    verdict,
)

NOISE, RATE, VIEWS = 1.0, 0.5, 2  # the audited mechanism: noise multiplier, sample rate, steps of one draw
CLEAR = 0.02  # a noise multiplier through which one sees who joined a step
HUGE = 100.0  # times the clipping norm: an example's gradient
LEVEL = 1e-4  # of the test of sampling


@dataclass(frozen=True)
class DPAudit:
    """What a test of DP-SGD found.

    Attributes:
        verdict: ``"rejected"``, ``"consistent"`` or ``"too weak to tell"``.
        faults: what is wrong, in words; empty unless rejected.
        bound: epsilon is at least this, with 95 % confidence.
        claimed: epsilon by the callback's own history.
        ceiling: the largest bound that so many draws could have found.
        delta: of all three.
        draws: with a canary, and as many without.
        noise: standard deviation of a canary's coordinate when it is absent; the claimed noise multiplier is 1.
        signal: mean of a present canary's coordinate; at most the sample rate, 0.5, if it was clipped.
        sampling: probability of what was seen of the sampling, if it were Poisson sampling.
        seconds: what it took.
    """

    verdict: str
    faults: tuple[str, ...]
    bound: float
    claimed: float
    ceiling: float
    delta: float
    draws: int
    noise: float
    signal: float
    sampling: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins."""
        return {**asdict(self), "faults": list(self.faults)}


def audit_dp_sgd(
    make: Callable[..., DPSGD] = DPSGD,
    *,
    canaries: int = 1024,
    steps: int = 20,
    delta: float = 0.01,
    trainer: Mapping[str, Any] | None = None,
) -> DPAudit:
    """Train a frozen linear model privately, on examples whose gradients are known, and look at what comes out.

    Every example's gradient is a huge multiple of a unit vector of its own, or zero. As nothing is learned (learning
    rate 0) and no two examples share a coordinate, every coordinate of every two steps is an independent draw of what
    sampler, clipping and noise make of one example: half of them with it, half without. All goes through a real
    Trainer, the callback and its loader. A second run with hardly any noise shows who joined which step.

    Args:
        make: called with ``noise_multiplier``, ``sample_rate`` and ``accountant``, makes the callback; for example
            ``partial(DPSGD, engine="hooks", physical_batch_size=100)``.
        canaries: examples, >= 8 and divisible by 4.
        steps: of each run, even, >= 2. There are ``canaries * steps / 4`` draws of each kind.
        delta: with which epsilon is claimed.
        trainer: settings of the Trainers, such as strategy and devices.

    Returns:
        The findings; in several processes those of the process whose gradients reveal the most, on all of them.

    Raises:
        ValueError: a setting is out of range.

    Guarantees:
        A correct engine is rejected with a probability of at most about 5 %. Global random generators are as before.

    References:
        Nasr et al., "Adversary Instantiation: Lower Bounds for Differentially Private Machine Learning", 2021 (gradient
        canaries); Jagielski et al., 2020 (the bound).
    """
    check_counts("audit_dp_sgd", 8, canaries=canaries)
    check_counts("audit_dp_sgd", 2, steps=steps)
    if canaries % 4 or steps % VIEWS:
        raise ValueError(f"audit_dp_sgd: canaries must be divisible by 4 and steps even, got {canaries} and {steps}")
    began = time.monotonic()
    present = np.arange(canaries) % 4 < 2  # half of them, also of every second one, as two processes share them
    views, history = _views(make, NOISE, present, steps, trainer or {})
    clear, _ = _views(make, CLEAR, np.ones(canaries, dtype=bool), steps, trainer or {})
    noise, rate = (history[-1][0], history[-1][1]) if history else (NOISE, RATE)
    claimed = accounting.epsilon([(noise, rate, VIEWS)], delta, "prv")
    absent, there = (statistics(views[kind].reshape(-1, VIEWS), noise, rate) for kind in (~present, present))
    found = (two_sample_bound(absent, there, delta), two_sample_ceiling(absent.shape[1], there.shape[1], delta))
    sampling = sampling_p_value(clear > 0.5, rate)
    faults = []
    if found[0] > claimed:
        faults.append(f"epsilon is at least {found[0]:.2f}, and {claimed:.2f} is claimed")
    if sampling < LEVEL:
        faults.append(f"examples do not join steps by independent coin flips (p = {sampling:.1g})")
    if (counted := sum(taken for *_, taken in history)) != steps:
        faults.append(f"{steps} steps were taken, and {counted} are in the history")
    said = REJECTED if faults else verdict(found[0], claimed, found[1])
    result = DPAudit(
        said,
        tuple(faults),
        found[0],
        claimed,
        found[1],
        delta,
        absent.shape[1],
        float(views[~present].std()),
        float(views[present].mean()),
        sampling,
        time.monotonic() - began,
    )
    return _worst(result)


def _views(
    make: Callable[..., DPSGD], noise: float, present: np.ndarray, steps: int, settings: Mapping[str, Any]
) -> tuple[np.ndarray, list[Any]]:
    """What an observer of the gradients sees of each canary in each step, ``(N, steps)``, in clipping norms."""
    private, seen = make(noise_multiplier=noise, sample_rate=RATE, accountant="rdp"), _Seen()
    n = len(present)
    x = torch.diag(torch.from_numpy(present).float() * HUGE * private.max_grad_norm)
    with tempfile.TemporaryDirectory() as folder, preserved_rng(torch.device("cpu")), quiet():
        trainer = pl.Trainer(
            **{
                "max_epochs": math.ceil(steps * RATE),
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                **settings,
                "callbacks": [private, seen],
            }
        )
        trainer.fit(_Frozen(n), DataLoader(TensorDataset(x), batch_size=n // 2, shuffle=True))
    size = RATE * n / private.max_grad_norm
    return torch.stack(seen.gradients, 1).double().numpy() * size, list(private.history)


class _Frozen(pl.LightningModule):
    """Its gradient at an example is the example, and no step changes it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 1, bias=False)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Seen(Callback):
    """Keeps every gradient that the optimizer is given."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(pl_module.layer.weight.grad.detach().flatten().cpu().clone())


def _worst(own: DPAudit) -> DPAudit:
    """Of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own.to_dict())
    worst = max(everyone, key=lambda found: (found["verdict"] == REJECTED, found["bound"]))
    return DPAudit(**{**worst, "faults": tuple(worst["faults"])})
