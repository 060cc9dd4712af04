"""Universal perturbations: one perturbation that fools a model on most inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust_train.evasion._tensors import read_tensors, write_tensors
from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.randomness import generator_for, preserved_rng
from robust_train.evasion.threat import NORMS, Threat
from robust_train.evasion.victim import ClassifierVictim, Victim, input_gradient
from robust_train.evasion.wrapped import WrappedVictim

LARGEST_FILE = 2**31
DELTA = "delta"


def universal_perturbation(
    model: nn.Module,
    loader: Iterable[Any],
    threat: Threat,
    *,
    epochs: int = 5,
    step_size: float | None = None,
    clip: float = 9.0,
    seed: int = 0,
) -> Tensor:
    """Find one perturbation for all inputs of a loader: gradient steps on the clipped loss, a batch at a time.

    Args:
        model: ``x -> logits (B, classes)``; judged in eval mode, and left as it was found.
        loader: yields ``(x, labels, ...)``, all of one shape, and can be run through ``epochs`` times.
        threat: the ball that the perturbation lies in, and the range of the inputs.
        epochs: how often the loader is run through, >= 1.
        step_size: length of a step in pixels (see ``Threat.ascend``); None: ``eps / 10``.
        clip: examples whose loss is above it count no more, so that a few cannot dominate.
        seed: of the first perturbation, a uniform point of the ball.

    Returns:
        The perturbation in pixels, of the shape of one input. Give it to ``apply_universal`` or ``save_universal``.

    Raises:
        ValueError: the loader is empty, the norm is L0, or a setting is out of range.

    Reference:
        Shafahi et al., "Universal Adversarial Training", 2020, section 4 (algorithm 2 without the training); the task:
        Moosavi-Dezfooli et al., "Universal Adversarial Perturbations", 2017.
    """
    check_counts("universal_perturbation", epochs=epochs)
    if threat.norm == "l0":
        raise ValueError("universal_perturbation takes steps in the norms linf, l2 and l1, but threat.norm is l0")
    step_size = threat.radius / 10 if step_size is None else step_size
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ball = replace(threat, low=float("-inf"), high=float("inf"))
    delta = None
    with preserved_rng(device), ClassifierVictim(model, torch.empty(0)).undisturbed():
        model.eval()
        for _ in range(epochs):
            for x, labels, *_ in loader:
                x, labels = x.to(device), labels.to(device)
                threat.check_input(x)
                origin = torch.zeros_like(working_precision(x[:1]))
                if delta is None:
                    delta = ball.random_start(origin, generator_for(device, "universal", seed))
                victim = _Clipped(ClassifierVictim(model, labels), clip)
                low, high = threat.box(working_precision(x))
                here = torch.clamp(working_precision(x) + delta, low, high)
                grad, _, _ = input_gradient(victim, here.to(x.dtype))
                mean = grad.to(delta.dtype).mean(0, keepdim=True)
                delta = ball.project(delta + ball.ascend(mean, step_size), origin)
    if delta is None:
        raise ValueError("there is nothing to learn a perturbation from: the loader is empty")
    return (delta * threat.scale(delta)).squeeze(0).cpu()


def apply_universal(x: Tensor, delta: Tensor, threat: Threat) -> Tensor:
    """Inputs with a perturbation added, inside ball and box.

    Args:
        x: clean inputs ``(B, ...)``.
        delta: in pixels, of the shape of one input.
        threat: ball and box.
    """
    clean = working_precision(x)
    return threat.project(clean + delta.to(clean).unsqueeze(0) / threat.scale(clean), clean)


def save_universal(path: str | Path, delta: Tensor, threat: Threat) -> None:
    """Write a perturbation into a safetensors file, which holds numbers and texts only, whole or not at all.

    Args:
        path: of the file; what was there is replaced.
        delta: what ``universal_perturbation`` returned.
        threat: what it was found within, noted in the file.
    """
    write_tensors(path, {DELTA: delta}, {"threat": threat.describe()})


def load_universal(path: str | Path) -> Tensor:
    """What ``save_universal`` wrote.

    Raises:
        ValueError: there is no such file, or it is another one.
    """
    tensors, _ = read_tensors(path, LARGEST_FILE)
    if set(tensors) != {DELTA} or not tensors[DELTA].is_floating_point():
        raise ValueError(f"{path} holds no universal perturbation: write it with save_universal")
    return tensors[DELTA]


@dataclass(frozen=True)
class Universal(Attack):
    """One perturbation for all inputs, found beforehand: what an attacker can do who does not see the input.

    ``universal_perturbation`` finds it, on the training data, and ``save_universal`` writes it. Within a smaller ball
    than the one that it was found in, it is cut down to that.

    Args:
        path: the file; read whenever the attack runs.

    Raises:
        ValueError: ``path`` is no text; when it runs: the file is missing or another one, or its perturbation has
            another shape than the inputs.

    Guarantees:
        The model under attack is never called.

    Reference:
        Moosavi-Dezfooli et al., "Universal Adversarial Perturbations", 2017; Shafahi et al., "Universal Adversarial
        Training", 2020.
    """

    family: ClassVar[str] = "universal"
    works_in: ClassVar[tuple[str, ...]] = NORMS

    path: str | None = None

    def __post_init__(self) -> None:
        if self.path is not None and (not isinstance(self.path, str) or not self.path):
            raise ValueError(f"universal.path must be the path of a file that save_universal wrote, got {self.path!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def passes(self) -> float:
        return 0.0

    def check(self, threat: Threat) -> None:
        super().check(threat)
        if self.path is None:
            raise ValueError(
                "universal.path is missing: find a perturbation with universal_perturbation(model, loader, threat) and "
                "write it with save_universal"
            )

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        delta = load_universal(str(self.path))
        if delta.shape != x.shape[1:]:
            raise ValueError(f"{self.path} is for inputs of shape {tuple(delta.shape)}, got {tuple(x.shape[1:])}")
        return apply_universal(x, delta, threat)


class _Clipped(WrappedVictim):
    """Losses above a bound count as the bound, without gradient."""

    def __init__(self, inner: Victim, bound: float) -> None:
        super().__init__(inner)
        self._bound = bound

    def loss(self, x: Tensor) -> Tensor:
        return self.inner.loss(x).clamp(max=self._bound)
