"""Poisoned training data in an unmodified run, to measure what a defence finds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, call_text, plain
from robust_train.callbacks._inner import fit_copy
from robust_train.callbacks._loaders import check_loader, rebuilt
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.randomness import preserved_rng
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import ClassifierVictim
from robust_train.poisoning.dataset import PoisonedDataset
from robust_train.poisoning.metrics import detection
from robust_train.poisoning.poisons.base import Poison
from robust_train.poisoning.poisons.clean_label import CleanLabel
from robust_train.poisoning.probe import Probe

if TYPE_CHECKING:
    import pytorch_lightning as pl

ORDER = 0  # before anything looks at the data


class PoisonSimulation(Callback):
    """Puts poisoned rows into the train loader, in memory; for measuring, never for a model that is used.

    Args:
        poison: which rows become what.
        classes: how many classes the task has.
        attack: for ``CleanLabel`` without a ``perturb`` of its own: a copy of the module is trained on the clean rows,
            and this attack makes rows of the target class hard for it.
        threat: what the attack may do.

    Raises:
        TypeError: ``poison`` is of another kind.
        ValueError: in ``setup`` or with the first loader: data of another form than one (input, label) a row.

    Guarantees:
        The user's dataset is not changed. The same rows are poisoned in every run with the same data and poison.
    """

    def __init__(
        self, poison: Poison, classes: int, attack: Attack | None = None, threat: Threat | None = None
    ) -> None:
        if not isinstance(poison, Poison):
            raise TypeError(f"poison_simulation.poison must be a robust_train Poison, got {poison!r}")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise ValueError(f"poison_simulation.classes must be a whole number >= 2, got {classes!r}")
        if (attack is None) != (threat is None):
            raise ValueError("poison_simulation.attack and threat belong together: give both, or neither")
        self.poison, self.classes, self.attack, self.threat = poison, classes, attack, threat
        self._poisoned: tuple[Any, PoisonedDataset] | None = None
        self._undo = ExitStack()

    def settings(self) -> dict[str, Any]:
        names = ("poison", "classes", "attack", "threat")
        return {name: plain(getattr(self, name)) for name in names}

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
            self._undo.callback(
                _seams.exchange_train_loader(trainer, lambda loader: self._exchange(trainer, pl_module, loader), ORDER)
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.announce(trainer, f"active. The training data are poisoned on purpose: {call_text(self.poison)}.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._undo.close()

    def _exchange(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> Any:
        dataset = check_loader(loader).dataset
        if self._poisoned is None or self._poisoned[0] is not dataset:
            with preserved_rng(torch.device("cpu")), _seams.generators_kept(loader):
                poison = self.poison
                if isinstance(poison, CleanLabel) and poison.perturb is None and self.attack is not None:
                    poison = replace(poison, perturb=self._crafted(trainer, module, loader))
                self._poisoned = dataset, PoisonedDataset(dataset, poison, self.classes)
        return rebuilt(loader, self._poisoned[1])

    def _crafted(
        self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """What makes rows hard to recognise for a copy of the module that learned from the clean data."""
        rank_zero_info(f"PoisonSimulation: training a model for {call_text(self.attack)} to attack.")
        kept = _Kept()
        epochs = Probe().epochs_for(len(loader))
        data = rebuilt(loader, loader.dataset)
        fit_copy(trainer, module, data, epochs=epochs, seed=self.poison.seed, callbacks=[kept])
        model = kept.module.eval()
        attack, threat = self.attack, self.threat

        def perturb(x: Tensor, y: Tensor) -> Tensor:
            assert attack is not None  # noqa: S101  (checked with the settings)
            assert threat is not None  # noqa: S101
            generator = torch.Generator().manual_seed(self.poison.seed)
            parts = zip(x.split(256), y.split(256), strict=True)
            return torch.cat([attack(ClassifierVictim(model, label), part, threat, generator) for part, label in parts])

        return perturb


class _Kept(Callback):
    """Holds on to the module of a nested run."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.module = pl_module
