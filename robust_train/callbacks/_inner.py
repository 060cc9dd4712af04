"""The one nested Trainer: probes and reference models learn through the user's own step, and leave no trace."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback
from robust_train.evasion.randomness import preserved_rng

if TYPE_CHECKING:
    import pytorch_lightning as pl


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
    number of steps of this short run.

    Args:
        trainer: the outer Trainer.
        module: the user's LightningModule, which is not touched.
        loader: what to train on.
        epochs: how long.
        seed: of everything that is drawn inside; the global generators are as before afterwards.
        callbacks: of the inner run, in their order.
        checkpoint: a file whose weights the copy takes first.

    Raises:
        ValueError: the checkpoint does not fit.
    """
    copied = _seams.detached_copy(module)
    copied.configure_callbacks = list
    if checkpoint is not None:
        load_weights(copied, checkpoint)
    device = trainer.strategy.root_device
    kind = type(trainer.strategy.accelerator).__name__
    with preserved_rng(device), quiet(), torch.enable_grad():
        inner = type(trainer)(
            max_epochs=epochs,
            accelerator="gpu" if kind == "CUDAAccelerator" else "mps" if kind == "MPSAccelerator" else "cpu",
            devices=[device.index] if device.index is not None else 1,
            precision=trainer.precision,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            logger=[_seams.IdleLogger(logger) for logger in trainer.loggers] or False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=trainer.default_root_dir,
        )
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        inner.fit(copied, **_seams.data_for(trainer, loader))


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
