"""Watches adversarial training for catastrophic overfitting, and can repair it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from robust_train.callbacks._callback import Callback, call_text, plain
from robust_train.callbacks._checks import check_counts, check_switches, refuse_beside
from robust_train.callbacks._training_batches import TrainingBatches
from robust_train.callbacks.adversarial_training import AdversarialTraining
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.pgd import PGD

if TYPE_CHECKING:
    import pytorch_lightning as pl


def has_overfitted(trained: float, strong: float, gap: float) -> bool:
    """Whether a model resists the attack that it is trained with and not a stronger one.

    Args:
        trained: accuracy under the attack that it is trained with, in [0, 1].
        strong: accuracy under an attack of many steps, in [0, 1].
        gap: by how much the first must exceed the second.

    Returns:
        True where it does, and the second is less than a third of the first: one gradient step may well do less than
        many against a model that is sound.
    """
    return trained - strong > gap and strong < trained / 3


class CatastrophicOverfitting(Callback):
    """Compares what ``AdversarialTraining``'s attack and a stronger one leave of the accuracy, once an epoch.

    A model that is trained with one gradient step can learn to resist that step and nothing else: within an epoch its
    accuracy under many steps falls to nothing, while the training loss looks better than ever. When an epoch ends, its
    first training batches are attacked with both, and logged are

    * ``train/own_attack_acc``: accuracy under the attack that the model is trained with;
    * ``train/multi_step_acc``: accuracy under ``attack``.

    Where the first is high and the second is not (``has_overfitted``), one warning says what to do. With ``repair``,
    training goes on with ``attack`` from the next batch to the end of the run. Multi-step training recovers such a
    model (Li et al. found that a few batches do); it is not put back to one step afterwards, because what brought
    it there would do so again.

    Args:
        attack: the stronger attack; None: ``PGD(steps=10)``.
        batches: how many training batches of each process are attacked, each epoch, >= 1.
        gap: see ``has_overfitted``, in (0, 1).
        repair: switch to ``attack`` when the model has overfitted.
        seed: of the attacks' random starts.

    Raises:
        ValueError: a setting is out of range. In ``setup``: there is no ``AdversarialTraining`` beside it. With the
            first batch: the task has no classes.
        TypeError: ``attack`` is none.

    Guarantees:
        Without ``repair``, and as long as nothing was repaired, training is bit-identical to training without this
        callback.

    Reference:
        Wong et al., "Fast is better than free: Revisiting adversarial training", 2020, section 5.4 (the check on
        training batches); Li et al., "Towards Understanding Fast Adversarial Training", 2020 (recovery by PGD).

    Example::

        trainer = Trainer(callbacks=[AdversarialTraining(FGSM(), threat), CatastrophicOverfitting(repair=True)])
    """

    def __init__(
        self, attack: Attack | None = None, batches: int = 2, gap: float = 0.2, repair: bool = False, seed: int = 0
    ) -> None:
        attack = PGD(steps=10) if attack is None else attack
        if not isinstance(attack, Attack):
            raise TypeError(f"catastrophic_overfitting.attack must be a robust_train Attack, got {attack!r}")
        if attack.reach > 1:
            raise ValueError(
                f"catastrophic_overfitting.attack: {call_text(attack)} leaves the ball by a factor of "
                f"{attack.reach:g}; judge with one that stays inside, such as PGD"
            )
        check_counts("catastrophic_overfitting", 1, batches=batches)
        check_counts("catastrophic_overfitting", 0, seed=seed)
        check_switches("catastrophic_overfitting", repair=repair)
        if isinstance(gap, bool) or not isinstance(gap, (int, float)) or not 0 < gap < 1:
            raise ValueError(f"catastrophic_overfitting.gap must be in (0, 1), got {gap!r}")
        self.attack, self.batches, self.gap, self.repair, self.seed = attack, batches, gap, repair, seed
        self._training: AdversarialTraining | None = None
        self._kept: TrainingBatches | None = None
        self._epoch: int | None = None  # when it was found

    def settings(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in ("attack", "batches", "gap", "repair", "seed")}

    def state(self) -> dict[str, Any]:
        return {"settings": self.settings(), "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch = state_dict["epoch"]

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        found = [c for c in trainer.callbacks if isinstance(c, AdversarialTraining)]  # type: ignore[attr-defined]
        if not found:
            raise ValueError(
                "CatastrophicOverfitting watches an AdversarialTraining callback, and this Trainer has none: add one, "
                "or leave this callback out"
            )
        twins = [c for c in trainer.callbacks if isinstance(c, CatastrophicOverfitting)]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise ValueError("two CatastrophicOverfitting callbacks would log the same metrics: keep one")
        training = self._training = found[0]
        self.attack.check(training.threat)
        if self.repair:
            training.check_attack(self.attack)
            why = "the change of attack would follow from the private data. Give repair=False"
            refuse_beside(trainer, "DPSGD", "CatastrophicOverfitting(repair=True)", why)
        self._kept = TrainingBatches(
            type(self).__name__, self.batches, training.inputs, training.labels, training.logits, training.layer
        )
        self._epoch = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        then = "it is repaired" if self.repair else "a warning says so"
        self.announce(trainer, f"active. {self.batches} training batches an epoch, {call_text(self.attack)}; {then}.")
        if self.repair and self._epoch is not None and self._training is not None:  # the run goes on repaired
            self._training.switch(self.attack)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._kept is not None:
            self._kept.keep(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept, training = self._kept, self._training
        if kept is None or training is None:
            return
        own, threat = training.schedule(training.attack, training.threat, trainer.current_epoch, trainer.global_step)
        if self.repair and self._epoch is not None:
            own = self.attack
        attacks = {"own": own, "strong": self.attack}
        found = kept.judged(trainer, pl_module, threat, attacks, self.seed, trainer.current_epoch)
        if found is None:
            return
        pl_module.log("train/own_attack_acc", found["own"])
        pl_module.log("train/multi_step_acc", found["strong"])
        if self._epoch is None and has_overfitted(found["own"], found["strong"], self.gap):
            self._epoch = trainer.current_epoch
            self._tell(training, own, found)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._kept = self._training = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._kept = self._training = None

    def _tell(self, training: AdversarialTraining, own: Attack, found: dict[str, float]) -> None:
        rank_zero_warn(
            f"CatastrophicOverfitting: in epoch {self._epoch} the model is right on {100 * found['own']:.0f} % of the "
            f"training examples as its own attack {call_text(own)} changes them, and on {100 * found['strong']:.0f} % "
            f"as {call_text(self.attack)} does. "
            + (
                f"It is trained with {call_text(self.attack)} from here on."
                if self.repair
                else "It has learned to resist that one attack only, and further epochs will not mend it. Train again "
                "with noise before the step (recipes fgsm_rs, n_fgsm), with several steps (pgd_at), with the objective "
                "GradAlign, or within a smaller eps; or give CatastrophicOverfitting(repair=True)."
            )
        )
        if self.repair:
            rank_zero_info(f"CatastrophicOverfitting: each batch costs {self.attack.passes:g} passes of attack now.")
            training.switch(self.attack)
