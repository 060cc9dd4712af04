"""The one nested Trainer: probes and reference models learn through the user's own step, and leave no trace."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback
from robust_train.evasion.randomness import preserved_rng

if TYPE_CHECKING:
    import pytorch_lightning as pl

# The copy is made when these were called, or they are for what remains of a run: files, mostly.
IDLE = ("prepare_data", "setup", "configure_model", "on_train_end", "on_fit_end", "teardown", "print")


def fit_copy(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Any,
    *,
    epochs: int,
    seed: int,
    callbacks: Sequence[Callback],
    checkpoint: str | None = None,
) -> None:
    """Train a throw-away copy of the module on a loader, as the user's Trainer would, on one device.

    Nothing is logged, validated or saved, and the callbacks of the outer run do not take part. Precision, gradient
    clipping and accumulation are the outer Trainer's; ``configure_optimizers`` is the module's own and is told the
    number of steps of this short run. The module's hooks are called, but for those around a fit (``IDLE``).

    Args:
        trainer: the outer Trainer.
        module: the user's LightningModule, which is not touched.
        loader: what to train on.
        epochs: how long.
        seed: of everything that is drawn inside; the global generators are as before afterwards.
        callbacks: of the inner run, in their order.
        checkpoint: a file whose weights the copy takes first.

    Raises:
        ValueError: the module cannot be copied, the copy still reaches it, or the checkpoint does not fit.
    """
    copied = throwaway_copy(module, checkpoint)
    device = trainer.strategy.root_device
    kind = type(trainer.strategy.accelerator).__name__
    with preserved_rng(device), quiet(), torch.enable_grad():
        inner = _seams.trainer_class(trainer)(
            max_epochs=epochs,
            accelerator="gpu" if kind == "CUDAAccelerator" else "mps" if kind == "MPSAccelerator" else "cpu",
            devices=[device.index] if device.index is not None else 1,
            precision=trainer.precision,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            logger=[_seams.IdleLogger(logger) for logger in trainer.loggers] or False,
            plugins=[_seams.single_process_environment(trainer)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=trainer.default_root_dir,
        )
        inner.callbacks = list(callbacks)  # and none that an environment adds to every Trainer
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with untouched(module):
            inner.fit(copied, **_seams.data_for(trainer, loader))


def throwaway_copy(module: pl.LightningModule, checkpoint: str | None = None) -> Any:
    """A deep copy of a module that was set up, to be trained once.

    Functions that it holds and that refer to the module or a part of it (hooks, mostly) refer to the copy's. What is
    compiled is not: compiling takes longer than a probe. Datasets and loaders that it holds are shared.

    Args:
        module: the user's.
        checkpoint: a file whose weights the copy takes.

    Raises:
        ValueError: the module cannot be copied, or the checkpoint does not fit.
    """
    memo = {id(value): value for value in vars(module).values() if isinstance(value, (Dataset, DataLoader))}
    try:
        new = _seams.detached_copy(module, memo)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"a copy of {type(module).__name__} is to be trained, and it cannot be copied: {reason}. Keep what cannot "
            "be copied (iterators, open files, results of earlier steps) out of the module's attributes"
        ) from error
    if checkpoint is not None:
        load_weights(new, checkpoint)
    for part in new.modules():
        hooks = [value for name, value in vars(part).items() if name.endswith("_hooks") and isinstance(value, dict)]
        for namespace in (vars(part), *hooks):
            for name, value in namespace.items():
                namespace[name] = _referring_to_copy(value, memo)
    uncompile(new)
    new.configure_callbacks = list
    for name in IDLE:
        setattr(new, name, _nothing)
    return new


def _referring_to_copy(value: Any, memo: Mapping[int, Any]) -> Any:
    """A function of the user's whose variables are the copies of what they are in the original."""
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = tuple(CellType(memo[id(_content(c))]) if id(_content(c)) in memo else c for c in value.__closure__)
    if all(new is old for new, old in zip(cells, value.__closure__, strict=True)):
        return value
    new = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    new.__kwdefaults__ = value.__kwdefaults__
    return new


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None


def uncompile(module: nn.Module) -> None:
    """Call what is compiled in a module as it was written."""
    for part in list(module.modules()):
        part._compiled_call_impl = None
        for name, child in list(part.named_children()):
            if type(child).__name__ == "OptimizedModule":
                part._modules[name] = child._orig_mod  # type: ignore[assignment]


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Notice that what happens inside, to a copy, reaches the module itself.

    Raises:
        ValueError: it does.
    """

    def look() -> list[Any]:
        return [(id(t), _version(t), _version(t.grad)) for t in (*module.parameters(), *module.buffers())]

    before = look()
    yield
    if look() != before:
        raise ValueError(
            f"a copy of {type(module).__name__} was trained, and that changed the module itself: something that it "
            "holds (a function, a partial, an object with a __deepcopy__ of its own) refers to it. Make it a method"
        )


def _version(tensor: Tensor | None) -> int | None:
    """How often it was written to, if it is there and counts that."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a hook."""


def load_weights(module: pl.LightningModule, path: str) -> None:
    """Weights of a checkpoint, and nothing else of it.

    Raises:
        ValueError: there is no such file, or it does not fit the module.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(content.get("state_dict", content))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"probe.checkpoint={path!r} does not fit {type(module).__name__}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that Lightning gives on every new Trainer; warnings of the user's own code are shown."""
    loggers = [logging.getLogger(f"{root}.utilities.rank_zero") for root in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
