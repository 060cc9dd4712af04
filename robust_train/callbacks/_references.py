"""Reference models for audits: copies of a module that learn from other rows, and a cache of them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from robust_train.callbacks._callback import Callback
from robust_train.callbacks._inner import fit_copy, throwaway_copy
from robust_train.callbacks._poisson import PoissonLoader
from robust_train.custody.digest import digests
from robust_train.custody.merkle import merkle_root
from robust_train.evasion._tensors import NAMES, as_bytes, read_tensors, write_tensors

if TYPE_CHECKING:
    import pytorch_lightning as pl

STARTS = ("reset", "initial")
LARGEST = 2**36  # bytes of a cached model
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How reference models are trained.

    Attributes:
        epochs: over each one's rows.
        start: ``"reset"``: every layer draws its parameters anew, and what no layer can reset begins as training began;
            ``"initial"``: everything begins as training began.
        initial: the module's tensors when training began.
        batch_size: rows of a batch.
        loader: the train loader, whose collate function and workers are used.
        seed: of the first reference; the others count on.
    """

    epochs: int
    start: str
    initial: Weights
    batch_size: int
    loader: Any
    seed: int


def rows_of(loader: Any) -> tuple[Any, int]:
    """The dataset behind a train loader, and the number of rows in a batch.

    Raises:
        ValueError: there is no map-style dataset behind it.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, (DataLoader, PoissonLoader)) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"MembershipAudit needs one train loader of a map-style dataset, got {type(loader).__name__}: whose "
            "examples are members must be known by number"
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return dataset, size or max(1, round(len(dataset) / max(1, len(loader))))  # type: ignore[arg-type]


def snapshot(module: nn.Module) -> Weights:
    """The module's tensors as they are now."""
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def copy_for_audit(trainer: pl.Trainer, module: pl.LightningModule, weights: Mapping[str, Tensor] | None = None) -> Any:
    """A copy of the module on the Trainer's device, which an audit may call; with other weights, if there are."""
    copied = throwaway_copy(module)
    if weights is not None:
        copied.load_state_dict(weights, strict=False)
    copied.to(trainer.strategy.root_device)
    copied.trainer = trainer
    return copied.eval()


def references(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    pool: Any,
    trained_on: np.ndarray,
    training: Training,
    cache: Path | None,
) -> Iterator[tuple[Any, bool]]:
    """Copies of the module, each trained from the start on its rows of the pool.

    Args:
        trainer: the outer Trainer.
        module: the user's, which is not touched.
        pool: map-style dataset with N rows.
        trained_on: bool ``(R, N)``.
        training: how.
        cache: folder of models that were trained before; None: none is kept.

    Yields:
        R pairs of the trained copy, ready to be called, and whether it came from the cache.
    """
    root = None if cache is None else _root(pool)
    for number, rows in enumerate(trained_on):
        path = None
        if cache is not None and root is not None:
            path = cache / f"{_key(trainer, module, training, root, rows, training.seed + number)}.safetensors"
        if path is not None and path.is_file():
            yield copy_for_audit(trainer, module, read_tensors(path, LARGEST)[0]), True
            continue
        kept = _Kept(training)
        chosen = Subset(pool, np.flatnonzero(rows).tolist())
        loader = DataLoader(
            chosen,
            batch_size=training.batch_size,
            shuffle=True,
            drop_last=len(chosen) > training.batch_size and len(chosen) % training.batch_size == 1,
            num_workers=training.loader.num_workers,
            collate_fn=training.loader.collate_fn,
        )
        fit_copy(trainer, module, loader, epochs=training.epochs, seed=training.seed + number, callbacks=[kept])
        if path is not None and all(tensor.dtype in NAMES for tensor in kept.weights.values()):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_tensors(path, kept.weights, {})
            os.chmod(path, 0o600)  # it learned from training data
        yield copy_for_audit(trainer, module, kept.weights), False


def restart(module: nn.Module, training: Training) -> None:
    """Put a module back to where training begins.

    Raises:
        ValueError: a parameter can neither be reset nor is known from the beginning.
    """
    own = module.state_dict()
    fitting = {k: v for k, v in training.initial.items() if k in own and own[k].shape == v.shape}
    module.load_state_dict(fitting, strict=False)
    layers = _resettable(module) if training.start == "reset" else {}
    for layer in layers.values():
        layer.reset_parameters()  # type: ignore[operator]
    lost = [name for name, _ in module.named_parameters() if not _is_reset(name, layers) and name not in fitting]
    if lost:
        raise ValueError(
            f"MembershipAudit cannot start reference models anew: {', '.join(lost[:3])} came into being after "
            "setup, and the layer has no reset_parameters(). Give it one, or build the layer in __init__"
        )


def _resettable(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that can draw their parameters anew, by name."""
    return {name: layer for name, layer in module.named_modules() if callable(getattr(layer, "reset_parameters", None))}


def _is_reset(tensor: str, layers: Mapping[str, nn.Module]) -> bool:
    return tensor.rpartition(".")[0] in layers


class _Kept(Callback):
    """Starts a nested run anew, and holds on to what it learned."""

    def __init__(self, training: Training) -> None:
        self._training, self.weights = training, Weights()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        restart(pl_module, self._training)  # before the optimizers are made

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = snapshot(pl_module)


def _root(pool: Any) -> str | None:
    """One digest of all rows; None where a row has none, or another one each time it is read."""
    try:
        return merkle_root(digests(pool)).hex()
    except (TypeError, ValueError):
        return None


def _key(trainer: Any, module: Any, training: Training, root: str, rows: np.ndarray, seed: int) -> str:
    """A name for what a reference model depends on, as far as it can be seen."""
    settings = {k: repr(v) for k, v in sorted(vars(module).items()) if isinstance(v, (bool, int, float, str, tuple))}
    layers = _resettable(module) if training.start == "reset" else {}
    start = {
        name: "reset" if _is_reset(name, layers) else hashlib.sha256(as_bytes(tensor)).hexdigest()
        for name, tensor in training.initial.items()
    }
    seen = {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "source": _source(type(module)),
        "settings": settings,
        "hparams": repr(dict(module.hparams)),
        "structure": repr(module),
        "start": start,
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "collate": getattr(training.loader.collate_fn, "__qualname__", ""),
        "trainer": [
            str(trainer.precision),
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
            trainer.accumulate_grad_batches,
        ],
        "data": root,
        "rows": hashlib.sha256(np.packbits(rows).tobytes()).hexdigest(),
        "seed": seed,
        "versions": [torch.__version__, version("pytorch-lightning")],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
