"""Logs robust overfitting: how much more robust a model is on what it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robust_train.callbacks._callback import Callback, plain
from robust_train.callbacks._checks import check_counts, check_name
from robust_train.callbacks._training_batches import TrainingBatches
from robust_train.callbacks.robust_evaluation import RobustEvaluation

if TYPE_CHECKING:
    import pytorch_lightning as pl


class RobustOverfitting(Callback):
    """Judges a few training batches as ``RobustEvaluation`` judges the validation data, and logs the difference.

    After some epochs of adversarial training the robust accuracy on the training data still climbs and that on new
    data falls, while the clean accuracy may go on rising. Whenever ``RobustEvaluation`` has judged the validation data
    in ``fit``, the first batches of the epoch are judged by the same attacks within the same threat, with the same
    weights (averaged ones, where a callback averages weights), and logged are

    * ``train/robust_acc``: robust accuracy on these training batches, as the training step receives them;
    * ``train/robust_gap``: ``train/robust_acc - val/robust_acc``.

    The cure is to stop, or to keep the checkpoint, where ``val/robust_acc`` is best: Lightning's ``EarlyStopping`` and
    ``ModelCheckpoint`` with ``monitor="val/robust_acc", mode="max"``.

    Args:
        batches: how many training batches of each process are attacked, >= 1.
        name: the ``name`` of the RobustEvaluation to compare with; its metrics are ``val/<name>/robust_acc``.

    Raises:
        ValueError: a setting is out of range. In ``setup``: there is no such ``RobustEvaluation`` beside it. With the
            first batch: the task has no classes.

    Guarantees:
        Training is bit-identical to training without this callback.

    Reference:
        Rice et al., "Overfitting in adversarially robust deep learning", 2020.

    Example::

        trainer = Trainer(callbacks=[AdversarialTraining(PGD(), threat), RobustEvaluation(PGD(), threat),
                                     RobustOverfitting(batches=4)])
    """

    def __init__(self, batches: int = 4, name: str = "") -> None:
        check_counts("robust_overfitting", 1, batches=batches)
        check_name("robust_overfitting", name)
        self.batches, self.name = batches, name
        self._evaluation: RobustEvaluation | None = None
        self._kept: TrainingBatches | None = None
        self._trained: float | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def settings(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in ("batches", "name")}

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks if isinstance(c, RobustEvaluation) and c.name == self.name]
        if not found:
            raise ValueError(
                f"RobustOverfitting compares with the RobustEvaluation whose name is {self.name!r}, and this Trainer "
                "has none: add one, or give this callback the name of the one that is there"
            )
        if sum(isinstance(c, RobustOverfitting) and c.name == self.name for c in callbacks) > 1:
            raise ValueError(f"two RobustOverfitting callbacks with name={self.name!r} would log the same metrics")
        judge = self._evaluation = found[0]
        self._kept = TrainingBatches(
            type(self).__name__, self.batches, judge.inputs, judge.labels, judge.logits, judge.layer
        )
        self._trained = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.announce(trainer, f"active. {self.batches} training batches are judged with every validation.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._kept is not None:
            self._kept.keep(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # not at the start of the epoch, when averaged weights may or may not be in place yet
        first = batch_idx == dataloader_idx == 0 and not trainer.sanity_checking
        if first and self._kept is not None and self._evaluation is not None and self._evaluation.active:
            judge = self._evaluation
            found = self._kept.judged(trainer, pl_module, judge.threat, judge.attacks, judge.seed)
            self._trained = None if found is None else found["worst"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        prefix = f"{self.name}/" if self.name else ""
        validated = trainer.callback_metrics.get(f"val/{prefix}robust_acc")
        if self._trained is None or validated is None:
            return
        pl_module.log(f"train/{prefix}robust_acc", self._trained)
        pl_module.log(f"train/{prefix}robust_gap", self._trained - float(validated))
        self._trained = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._kept = self._evaluation = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._kept = self._evaluation = None
