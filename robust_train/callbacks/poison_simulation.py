"""Poisoned training data in an unmodified run, to measure what a defence finds."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, call_text, plain
from robust_train.callbacks._loaders import check_loader, rebuilt
from robust_train.evasion.randomness import preserved_rng
from robust_train.poisoning.dataset import PoisonedDataset
from robust_train.poisoning.metrics import detection
from robust_train.poisoning.poisons.base import Poison

if TYPE_CHECKING:
    import pytorch_lightning as pl

ORDER = 0  # before anything looks at the data


class PoisonSimulation(Callback):
    """Puts poisoned rows into the train loader, in memory; for measuring, never for a model that is used.

    Args:
        poison: which rows become what.
        classes: how many classes the task has.

    Raises:
        TypeError: ``poison`` is of another kind.
        ValueError: in ``setup`` or with the first loader: data of another form than one (input, label) a row.

    Guarantees:
        The user's dataset is not changed. The same rows are poisoned in every run with the same data and poison.
    """

    def __init__(self, poison: Poison, classes: int) -> None:
        if not isinstance(poison, Poison):
            raise TypeError(f"poison_simulation.poison must be a robust_train Poison, got {poison!r}")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise ValueError(f"poison_simulation.classes must be a whole number >= 2, got {classes!r}")
        self.poison, self.classes = poison, classes
        self._poisoned: tuple[Any, PoisonedDataset] | None = None
        self._undo = ExitStack()

    def settings(self) -> dict[str, Any]:
        return {"poison": plain(self.poison), "classes": self.classes}

    @property
    def mask(self) -> np.ndarray:
        """Which rows of the training data are poisoned, bool ``(M,)``.

        Raises:
            RuntimeError: nothing was poisoned yet.
        """
        if self._poisoned is None:
            raise RuntimeError(
                "PoisonSimulation has poisoned nothing yet: it does so when the train loader is asked for"
            )
        return np.asarray(self._poisoned[1].mask)

    def report(self, touched: np.ndarray) -> dict[str, Any]:
        """What a defence that touched these rows, bool ``(M,)``, found of the poison."""
        rates = {
            k: None if v != v else v
            for k, v in detection(torch.from_numpy(self.mask), torch.from_numpy(touched)).items()
        }
        return {
            "note": "The training data of this run were poisoned on purpose.",
            "poison": plain(self.poison),
            "poisoned_rows": int(self.mask.sum()),
            **rates,
        }

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._undo.callback(_seams.exchange_train_loader(trainer, self._exchange, ORDER))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.announce(trainer, f"active. The training data are poisoned on purpose: {call_text(self.poison)}.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()

    def _exchange(self, loader: Any) -> Any:
        dataset = check_loader(loader).dataset
        if self._poisoned is None or self._poisoned[0] is not dataset:
            with preserved_rng(torch.device("cpu")):
                self._poisoned = dataset, PoisonedDataset(dataset, self.poison, self.classes)
        return rebuilt(loader, self._poisoned[1])
