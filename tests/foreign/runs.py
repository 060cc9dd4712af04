"""Short fits that remember everything, so that two of them can be compared bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from foreign.cases import Case
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn

from robust_train.callbacks._callback import Callback

# what the callbacks log themselves
OURS = ("train/adv_loss", "train/own_attack_", "train/multi_step_", "train/robust_", "val/clean_", "val/robust_")
FRAMEWORK = {"_trainer", "_fabric", "_parameters", "_buffers", "_modules", "_hparams", "_log_hyperparams", "training"}
UNTIL_THE_END = {"training_step", "_metric_attributes", "_torchdynamo_wrapper_id"}  # ours while fitting; addresses


class RecordingLogger(Logger):
    """Keeps what it is told."""

    def __init__(self, save_dir: str = "runs") -> None:
        super().__init__()
        self.history: list[tuple[int | None, dict[str, float]]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.hyperparams: dict[str, Any] = {}
        self._save_dir = str(save_dir)

    name, version = "recording", "0"
    save_dir = property(lambda self: self._save_dir)

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_scalar=lambda *args: self.direct.append(args))

    def log_metrics(self, metrics, step=None):
        theirs = {k: v for k, v in metrics.items() if not k.startswith(OURS)}
        if set(theirs) - {"epoch"}:
            self.history.append((step, theirs))

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparams.update(params)


class Witness(Callback):
    """The state of module and global generators after every batch and epoch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _look(self, module: nn.Module) -> None:
        self.seen.append({"module": portrait(module), "rng": global_rng()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look(pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._look(pl_module)

    def on_fit_end(self, trainer, pl_module):
        self._look(pl_module)


@dataclass
class Fit:
    """A finished fit."""

    module: Any
    trainer: Any
    logger: RecordingLogger
    seen: list[Any] = field(default_factory=list)

    @property
    def trace(self) -> dict[str, Any]:
        """All that a callback which does nothing must not have changed."""
        metrics = {k: portrait(v) for k, v in self.trainer.callback_metrics.items() if not k.startswith(OURS)}
        logged = {"history": portrait(self.logger.history), "direct": portrait(self.logger.direct)}
        after = {"global_step": self.trainer.global_step, "rng": global_rng()}
        return {"by_batch": self.seen, "module": portrait(self.module), "metrics": metrics, **logged, **after}


def fit(case: Case, *callbacks: Any, seed: int = 0, module: Any = None, data: Any = None, **settings: Any) -> Fit:
    """Two short epochs on CPU."""
    seed_all(seed)
    module = case.module() if module is None else module
    logger, witness = RecordingLogger(), Witness()
    trainer = make_trainer(case.trainer, *callbacks, witness, logger=logger, **settings)
    trainer.fit(module, **(case.data() if data is None else data))
    return Fit(module, trainer, logger, witness.seen)


def make_trainer(cls: type = pl.Trainer, *callbacks: Any, **settings: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    usual = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "log_every_n_steps": 1, **quiet}
    return cls(**{**usual, "callbacks": list(callbacks), **settings})


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_rng() -> Any:
    return portrait([torch.get_rng_state(), random.getstate(), list(np.random.get_state())])


def portrait(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Builtins that are equal where, and only where, two values are equal to the bit."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), value.requires_grad, raw.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return portrait(value.get_state())
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if id(value) in seen:
        return "seen above"
    seen = (*seen, id(value))
    if isinstance(value, nn.Module):
        own = {
            k: portrait(v, seen)
            for k, v in value.__dict__.items()
            if k not in FRAMEWORK | UNTIL_THE_END and "hooks" not in k
        }
        tensors = {k: portrait(v) for k, v in [*value._parameters.items(), *value._buffers.items()]}
        children = {k: portrait(v, seen) for k, v in value._modules.items()}
        return {**own, **tensors, **children, "training": value.training}
    if isinstance(value, Mapping):
        return {k: portrait(v, seen) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return [portrait(v, seen) for v in value]
    if type(value).__module__.startswith(("foreign", "test_")):
        names = getattr(value, "__slots__", None) or vars(value)
        return {k: portrait(getattr(value, k), seen) for k in names}
    return type(value).__name__


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two portraits differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{place}.{k} is in one only" for k in a.keys() ^ b.keys()]
        return missing + [d for k in a if k in b for d in differences(a[k], b[k], f"{place}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{place}[{i}]")]
    return [] if a == b else [place]


def assert_same(a: Any, b: Any) -> None:
    found = differences(a, b)
    assert not found, f"{len(found)} differences, the first: {found[:6]}"
