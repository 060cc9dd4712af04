"""Free adversarial training: one backward pass gives the gradients in the weights and in the input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import fresh
from robust_train.callbacks._callback import plain
from robust_train.callbacks._checks import check_counts, refuse_beside
from robust_train.callbacks._step import StepVictim
from robust_train.callbacks.adversarial_training import AdversarialTraining
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.fgsm import FGSM
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl


class Replayed:
    """A loader whose every batch comes several times in a row, each time as a copy; all else as it is.

    Args:
        loader: the user's.
        times: how often, >= 1.
    """

    def __init__(self, loader: Any, times: int) -> None:
        self.loader, self.times = loader, times

    def __len__(self) -> int:
        return self.times * len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            for _ in range(self.times):
                yield fresh(batch)

    def __getattr__(self, name: str) -> Any:  # sampler, dataset and whatever else Lightning reads
        return getattr(self.__dict__["loader"], name)


def carried(delta: Tensor | None, x: Tensor) -> Tensor:
    """A perturbation of an earlier batch, for this one: cut or filled up with zeros to as many examples.

    Args:
        delta: ``(A, ...)``, or None.
        x: clean inputs ``(B, ...)``.

    Returns:
        ``(B, ...)``; zeros where there is none, or where it is of another shape.
    """
    new = torch.zeros_like(x)
    if delta is not None and delta.shape[1:] == x.shape[1:]:
        rows = min(len(delta), len(x))
        new[:rows] = delta[:rows]
    return new


class FreeTraining(AdversarialTraining):
    """Adversarial training at the price of standard training: every batch is trained on ``replays`` times in a row.

    Each time the loss on the perturbed batch is differentiated once, in the weights and in the perturbation, and both
    take a step: the weights the user's optimizer's, the perturbation one of ``step * eps`` along its gradient. It is
    carried on to the next replay and the next batch, and starts at zero with every epoch.

    A replay is a training step like any other: ``global_step``, schedules by step and ``limit_train_batches`` count it.
    An epoch is ``replays`` times as long, so **divide max_epochs, and whatever else counts epochs, by replays**; then
    the run costs about as much as standard training.

    Args:
        threat: what the attacker may do.
        replays: how often each batch is trained on, >= 1; the paper has 8 for CIFAR-10 and 4 for ImageNet.
        step: length of the perturbation's step as a multiple of ``eps``, > 0.
        inputs: see ``AdversarialTraining``.

    Raises:
        ValueError: a setting is out of range. In ``setup``: what cannot be combined, ``DPSGD`` among it, whose account
            knows of no repeated batches. With the first batch: see ``AdversarialTraining``.

    Note:
        Data augmentation in the dataset or its loader is the same for all replays of a batch. The perturbation is not
        kept in checkpoints: a run that is resumed inside an epoch starts from zero, and with the next batch.

    Guarantees:
        With ``eps = 0`` and ``replays = 1`` the run is bit-identical to one without the callback. The training step is
        called exactly once a replay.

    Reference:
        Shafahi et al., "Adversarial Training for Free!", 2019, algorithm 1.
    """

    def __init__(self, threat: Threat, replays: int = 8, step: float = 1.0, inputs: str | int | None = None) -> None:
        check_counts("free_training", 1, replays=replays)
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < float("inf"):
            raise ValueError(f"free_training.step must be > 0 and finite, got {step!r}")
        super().__init__(FGSM(step=step), threat, inputs=inputs)
        self.replays, self.step = replays, step
        self._undo = ExitStack()
        self._delta: Tensor | None = None
        self._here: tuple[Tensor, Tensor, Threat] | None = None  # clean, perturbed, and the threat of this batch

    def settings(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in ("threat", "replays", "step", "inputs")}

    def perturbed(
        self, victim: StepVictim, x: Tensor, attack: Attack, threat: Threat, generator: torch.Generator
    ) -> Tensor:
        if self._run.attack is not None:  # CatastrophicOverfitting has put another in its place
            return super().perturbed(victim, x, attack, threat, generator)
        if threat.radius == 0:
            return x
        x_adv = threat.enclose(x + carried(self._delta, x), x).clone().requires_grad_(True)
        self._here = x, x_adv, threat
        return x_adv.clone()  # the user's step may write into what it is given

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            why = "its epsilon holds for batches that are drawn anew for every step. Use AdversarialTraining instead"
            refuse_beside(trainer, "DPSGD", "FreeTraining", why)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.replays > 1:
            self._undo.close()
            self._undo.callback(_seams.exchange_prepared_loader(trainer, lambda loader: Replayed(loader, self.replays)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.announce(
            trainer,
            f"active. Within the {self.threat.describe()}; every batch is trained on {self.replays} times in a row, so "
            f"an epoch is {self.replays} times as long: divide max_epochs by {self.replays} for the cost of standard "
            "training.",
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._delta = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._here is None:
            return
        x, x_adv, threat = self._here
        self._here = None
        if x_adv.grad is None:
            return  # the step skipped this batch
        ball = replace(threat, low=-float("inf"), high=float("inf"))
        delta = x_adv.detach() - x
        moved = x + delta + threat.ascend(torch.nan_to_num(x_adv.grad), self.step * threat.radius)
        self._delta = ball.project(moved, x) - x

    def _remove(self) -> None:
        self._undo.close()
        self._delta = self._here = None
        super()._remove()
