"""A second set of weights for the user's module: of a checkpoint, or of a nested run that learns plainly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback
from robust_train.callbacks._inner import fit_copy
from robust_train.evasion.randomness import preserved_rng
from robust_train.evasion.weights import exchanged

if TYPE_CHECKING:
    import pytorch_lightning as pl


class _Kept(Callback):
    """Holds on to the weights of a nested run."""

    weights: dict[str, Tensor]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: t.detach().cpu().clone() for name, t in _tensors(pl_module).items()}


def loaded_weights(module: nn.Module, path: str, setting: str) -> dict[str, Tensor]:
    """Weights of a checkpoint for this module, and nothing else of the file.

    Args:
        module: what they must fit.
        path: a checkpoint of Lightning's, or a file with a state dict.
        setting: what named the file, for messages.

    Raises:
        ValueError: there is no such file, or its weights do not fit.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content.get("state_dict", content)
        own = _tensors(module)
        if missing := sorted(own.keys() - found.keys()):
            raise ValueError(f"it has no {missing[0]}")
        if wrong := [name for name, t in own.items() if found[name].shape != t.shape]:
            raise ValueError(f"{wrong[0]} is {tuple(found[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{setting}={path!r} does not fit {type(module).__name__}: {reason}") from error
    return {name: found[name] for name in own}


def learned_weights(trainer: pl.Trainer, module: pl.LightningModule, epochs: int, seed: int) -> dict[str, Tensor]:
    """Weights of a copy of the module that learns from the run's own train loader, without any of our defences.

    Args:
        trainer: the run's; the first process trains, all are told.
        module: where the copy starts.
        epochs: how long.
        seed: of the nested run.
    """

    def work() -> dict[str, Tensor]:
        kept = _Kept()
        with preserved_rng(trainer.strategy.root_device):
            loaders = _seams.train_loader_before(trainer)
            with _seams.generators_kept(loaders, trainer.datamodule):  # type: ignore[attr-defined]
                fit_copy(trainer, module, loaders, epochs=epochs, seed=seed, callbacks=[kept])
        return kept.weights

    rank_zero_info(f"robust_train: a copy of the model is trained plainly first, for {epochs} epochs.")
    return _seams.wait_for_first(trainer, work)


@contextmanager
def as_helper(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module computes with these weights and buffers; its own are never written to.

    Raises:
        ValueError: the module's weights are sharded.
    """
    own = _tensors(module)
    if any(hasattr(t, "to_local") for t in own.values()):
        raise ValueError("a helper's weights cannot stand in for sharded ones (fully_shard): use strategy=ddp")
    with exchanged(module, {t: weights[name].to(t.device) for name, t in own.items() if name in weights}):
        yield


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers by name, the module's own objects."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
