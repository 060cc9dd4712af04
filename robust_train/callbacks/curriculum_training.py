"""Curriculum adversarial training: attacks gain a step whenever the model has learned to resist them."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from robust_train.callbacks._callback import call_text, plain
from robust_train.callbacks._checks import check_counts, refuse_beside
from robust_train.callbacks._training_batches import TrainingBatches
from robust_train.callbacks.adversarial_training import AdversarialTraining
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl


class CurriculumTraining(AdversarialTraining):
    """Adversarial training whose attack grows from one step to all of its steps, at the model's own pace.

    When an epoch ends, its first training batches are attacked with as many steps as the epoch was trained with. When
    their accuracy has not risen above its best for ``patience`` epochs, the attack gains a step, and counting starts
    again. Logged are ``train/attack_steps`` and ``train/curriculum_acc``. For a curriculum by the clock give
    ``AdversarialTraining`` a ``warmup_epochs`` instead.

    Args:
        attack: at full strength; one with ``steps``, such as ``PGD(steps=10)``.
        threat: see ``AdversarialTraining``.
        patience: epochs without progress after which the attack gains a step, >= 1; the paper has 10.
        batches: how many training batches of each process are attacked, each epoch, >= 1.
        objective: see ``AdversarialTraining``.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        layer: see ``AdversarialTraining``.
        mode: see ``AdversarialTraining``.
        seed: see ``AdversarialTraining``.

    Raises:
        ValueError: a setting is out of range; the attack has no steps that could grow. With the first batch: the task
            has no classes.

    Note:
        The paper also mixes examples of weaker attacks into every batch; here a batch has the present strength.

    Reference:
        Cai et al., "Curriculum Adversarial Training", 2018, section 3.1.
    """

    def __init__(
        self,
        attack: Attack,
        threat: Threat,
        patience: int = 2,
        batches: int = 2,
        objective: Objective | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        layer: str | None = None,
        mode: str = "eval",
        seed: int | None = None,
    ) -> None:
        check_counts("curriculum_training", 1, patience=patience, batches=batches)
        super().__init__(attack, threat, objective, inputs, labels, logits, layer, mode, seed=seed)
        if not is_dataclass(attack) or not hasattr(attack, "steps"):
            raise ValueError(f"curriculum_training.attack: {call_text(attack)} has no steps that could grow; use PGD")
        self.patience, self.batches = patience, batches
        self._most: int = attack.steps  # type: ignore[attr-defined]
        self._kept = TrainingBatches("CurriculumTraining", batches, inputs, labels, logits, layer)
        self._progress: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        own = {name: plain(getattr(self, name)) for name in ("patience", "batches")}
        return {**{k: v for k, v in super().settings().items() if "warmup" not in k}, **own}

    def schedule(self, attack: Attack, threat: Threat, epoch: int, step: int) -> tuple[Attack, Threat]:
        if attack is not self.attack:  # CatastrophicOverfitting has put another in its place
            return attack, threat
        return replace(attack, steps=self._progress["steps"]), threat  # type: ignore[type-var]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "progress": dict(self._progress)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._progress = dict(state_dict["progress"])

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            why = "the attack's strength would follow from the private data. Use AdversarialTraining(warmup_epochs=…)"
            refuse_beside(trainer, "DPSGD", "CurriculumTraining", why)
            self._progress = {"steps": 1, "best": -1.0, "waited": 0}
            self._kept = TrainingBatches(
                "CurriculumTraining", self.batches, self.inputs, self.labels, self.logits, self.layer
            )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._kept.keep(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = self._progress
        attack, threat = self.schedule(self.attack, self.threat, trainer.current_epoch, trainer.global_step)
        found = self._kept.judged(trainer, pl_module, threat, {"now": attack}, self._run.seed or 0)
        if found is None:
            return
        pl_module.log("train/attack_steps", float(now["steps"]))
        pl_module.log("train/curriculum_acc", found["now"])
        now["waited"] = 0 if found["now"] > now["best"] else now["waited"] + 1
        now["best"] = max(now["best"], found["now"])
        if now["waited"] >= self.patience and now["steps"] < self._most:
            self._progress = {"steps": now["steps"] + 1, "best": -1.0, "waited": 0}
            rank_zero_info(f"CurriculumTraining: attacks have {self._progress['steps']} steps from the next epoch on.")
