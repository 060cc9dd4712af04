"""Verified accuracy of an unmodified LightningModule, in every validation and test run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import MeanMetric

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, fresh, get
from robust_train.callbacks._bounds import bounded_logits, find_class_layout
from robust_train.callbacks._callback import Callback, call_text, plain
from robust_train.callbacks._checks import check_counts, check_name, check_places, check_texts
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim
from robust_train.evasion.certified.crown_ibp import CROWNIBP
from robust_train.evasion.certified.verifier import Verifier, proved
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl


class CertifiedEvaluation(Callback):
    """Logs ``val/verified_acc`` and ``test/verified_acc``: the share of examples that no attack within the threat can
    turn wrong, as far as bounds of the logits prove it.

    It is a lower bound of the true robust accuracy, as an attack's accuracy is an upper one.

    Args:
        threat: what the attacker may do; give the same as in training.
        verifier: how it is proved; None: ``CROWNIBP()``, which takes the better of two bounds.
        every_n_epochs: in ``fit``: in every n-th epoch, and in the last one.
        limit_batches: look only at the first batches of each loader; None: all.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        name: where two stand in one Trainer: part of the names, ``val/<name>/verified_acc``.

    Raises:
        ValueError: a setting is out of range; with the first batch: a layer that cannot be bounded, or no classes.
        TypeError: ``threat`` or ``verifier`` is of another kind.

    Guarantees:
        On the same batches it never exceeds ``RobustEvaluation``'s accuracy within the same threat, up to rounding;
        with ``eps = 0`` it is the clean accuracy.
    """

    at_test = True

    def __init__(
        self,
        threat: Threat,
        verifier: Verifier | None = None,
        every_n_epochs: int = 1,
        limit_batches: int | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        name: str = "",
    ) -> None:
        verifier = CROWNIBP() if verifier is None else verifier
        for key, value, kind in (("threat", threat, Threat), ("verifier", verifier, Verifier)):
            if not isinstance(value, kind):
                raise TypeError(f"certified_evaluation.{key} must be a robust_train {kind.__name__}, got {value!r}")
        batches = 1 if limit_batches is None else limit_batches
        check_counts("certified_evaluation", 1, every_n_epochs=every_n_epochs, limit_batches=batches)
        check_places("certified_evaluation", inputs=inputs, labels=labels)
        check_texts("certified_evaluation", logits=logits)
        check_name("certified_evaluation", name)
        self.threat, self.verifier, self.every_n_epochs, self.limit_batches = (
            threat,
            verifier,
            every_n_epochs,
            limit_batches,
        )
        self.inputs, self.labels, self.logits, self.name = inputs, labels, logits, name
        self._active = False
        self._mean: MeanMetric | None = None
        self._layout: Layout | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def settings(self) -> dict[str, Any]:
        names = ("threat", "verifier", "every_n_epochs", "limit_batches", "inputs", "labels", "logits", "name")
        return {name: plain(getattr(self, name)) for name in names}

    # --- events -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        twins = [
            c
            for c in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(c, CertifiedEvaluation) and c.name == self.name
        ]
        if len(twins) > 1:
            raise ValueError(f"two CertifiedEvaluation callbacks with name={self.name!r}: give each a name of its own")
        if stage in ("fit", "validate", "test"):
            self.announce(trainer, f"active. {call_text(self.verifier)} within the {self.threat.describe()}.")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        due = last or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._begin(trainer.state.fn != "fit" or trainer.sanity_checking or due)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._verify(trainer, pl_module, batch, batch_idx, dataloader_idx, "validation")

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._verify(trainer, pl_module, batch, batch_idx, dataloader_idx, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    # --- work ---------------------------------------------------------------------------------------------------------

    def _begin(self, active: bool) -> None:
        self._active, self._mean, self._layout = active, None, None

    def _verify(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, loader_idx: int, stage: str
    ) -> None:
        if not self._active or (self.limit_batches is not None and batch_idx >= self.limit_batches):
            return
        step = getattr(module, f"{stage}_step")

        def call(other: Any) -> Any:
            return step(other, *_seams.step_arguments(step, batch_idx, loader_idx))

        # out of inference mode, whose tensors take part in no gradient: the bounds go back by gradients
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(module.device.type, enabled=False):
            batch = fresh(batch)
            sandbox = Sandbox(module, trainer, get(batch, find_input(batch, self.inputs)).device)
            try:
                if self._layout is None:
                    self._layout = find_class_layout(self, module, call, batch, sandbox)
                victim = StepVictim(module, call, batch, self._layout, sandbox, own_loss=False)
                clean = victim.logits(get(batch, self._layout.input_path))
                bounds = bounded_logits(trainer, victim, self.threat)
            except StepSkipped:
                return
            found = proved(bounds, victim.known_labels(), self.verifier, clean)
        self._mean = MeanMetric().to(found.device) if self._mean is None else self._mean
        self._mean.update(found.float())

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, prefix: str) -> None:
        if not self._active or trainer.sanity_checking or self._mean is None:
            return
        prefix = f"{prefix}/{self.name}" if self.name else prefix
        module.log(f"{prefix}/verified_acc", self._mean.compute(), prog_bar=True, add_dataloader_idx=False)
