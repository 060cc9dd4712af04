"""Certified training of an unmodified LightningModule: on the worst that bounds of its logits allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, get
from robust_train.callbacks._bounds import bounded_logits, find_class_layout
from robust_train.callbacks._callback import Callback, call_text, place_text, plain, submodule
from robust_train.callbacks._checks import check_places, check_texts
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, batch_and_call, loss_of, with_loss
from robust_train.evasion.attacks._checks import is_number
from robust_train.evasion.certified.ibp import IBP
from robust_train.evasion.certified.verifier import Verifier, are_positive, class_differences, worst_case_loss
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl

OTHERS = {  # callbacks that train on something else in the same step
    "AdversarialTraining": "both would replace the loss of the same step: keep one of them",
    "DPSGD": "the bounds' part of the loss is no sum over examples that DP-SGD could clip: keep one of them",
}


class CertifiedTraining(Callback):
    """Trains a model so that what its bounds prove grows; module, data and Trainer stay as they are.

    In each training step the user's own step is run once more, on a box around the inputs in their place, up to the
    logits. The loss is ``w * own loss + (1 - w) * cross-entropy of the worst logits within the bounds``; the box grows
    from nothing to ``eps`` while ``w`` falls from 1 to ``clean_weight``.

    Args:
        threat: what the attacker may do; Linf (for L2 and L1 the box around the ball is bounded).
        verifier: how the logits are bounded; None: ``IBP()``.
        clean_weight: share of the own loss at the end, in [0, 1).
        warmup: share of the run without bounds, in [0, 1).
        ramp: share of the run over which the box grows, in [0, 1); the rest trains with all of ``eps``.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.

    Raises:
        ValueError: a setting is out of range; in ``setup``: a run without an end, or a callback that it cannot stand
            beside; with the first batch: a layer that cannot be bounded, or no classes.
        TypeError: ``threat`` or ``verifier`` is of another kind.

    Note:
        Batch normalisation is bounded with the statistics of the clean batch. Accuracy that is proved costs accuracy
        that is measured: small networks, and a smaller ``eps`` than adversarial training would take.

    Guarantees:
        With ``eps = 0`` and cross-entropy as the own loss, the loss is the own loss up to rounding. The bounds' extra
        call leaves no trace in the module. After ``fit``, also a failed one, the module is as before.

    Reference:
        Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
        sections 3 and 4.
    """

    defends = True

    def __init__(
        self,
        threat: Threat,
        verifier: Verifier | None = None,
        clean_weight: float = 0.5,
        warmup: float = 0.1,
        ramp: float = 0.5,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
    ) -> None:
        verifier = IBP() if verifier is None else verifier
        for name, value, kind in (("threat", threat, Threat), ("verifier", verifier, Verifier)):
            if not isinstance(value, kind):
                raise TypeError(f"certified_training.{name} must be a robust_train {kind.__name__}, got {value!r}")
        for name, value in (("clean_weight", clean_weight), ("warmup", warmup), ("ramp", ramp)):
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"certified_training.{name} must be in [0, 1), got {value!r}")
        if warmup + ramp >= 1:
            raise ValueError(
                f"certified_training.warmup={warmup} and ramp={ramp} take up the whole run, so that eps would never be "
                "reached: their sum must be below 1"
            )
        check_places("certified_training", inputs=inputs, labels=labels)
        check_texts("certified_training", logits=logits)
        self.threat, self.verifier, self.clean_weight = threat, verifier, clean_weight
        self.warmup, self.ramp = warmup, ramp
        self.inputs, self.labels, self.logits = inputs, labels, logits
        self._unwrap: Callable[[], None] | None = None
        self._layout: Layout | None = None
        self._batch_idx = 0

    def schedule(self, progress: float) -> tuple[float, float]:
        """The box's share of ``eps``, and the own loss's share; override for another curriculum.

        Args:
            progress: share of the run that is over, 0 to 1.
        """
        begun = progress - self.warmup
        grown = min(1.0, max(0.0, begun / self.ramp if self.ramp else float(begun >= 0)))
        return grown, 1 - grown * (1 - self.clean_weight)

    def settings(self) -> dict[str, Any]:
        names = ("threat", "verifier", "clean_weight", "warmup", "ramp", "inputs", "labels", "logits")
        return {name: plain(getattr(self, name)) for name in names}

    # --- events -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self._unwrap is not None:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for kind in type(callback).__mro__:
                if kind.__name__ in OTHERS:
                    raise ValueError(f"CertifiedTraining and {kind.__name__} in one Trainer: {OTHERS[kind.__name__]}")
        if reason := _seams.unsupported_strategy(trainer):
            raise ValueError(f"CertifiedTraining cannot work with {reason}")
        if _seams.takes_iterator(pl_module):
            raise ValueError("CertifiedTraining needs training_step(self, batch, batch_idx), not a dataloader_iter")
        if (trainer.max_epochs or -1) < 0 and trainer.max_steps < 0:
            raise ValueError("CertifiedTraining grows its box over the run: set the Trainer's max_epochs or max_steps")
        if self.logits is not None:
            submodule(pl_module, self.logits)
        self._layout = None
        self._unwrap = _seams.wrap_training_step(
            pl_module, lambda step, *args, **kwargs: self._step(trainer, pl_module, step, args, kwargs)
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.announce(
            trainer,
            f"active. {call_text(self.verifier)} within the {self.threat.describe()}, which grows from "
            f"{self.warmup:.0%} to {self.warmup + self.ramp:.0%} of the run.",
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
        self._unwrap = self._layout = None

    # --- one batch ----------------------------------------------------------------------------------------------------

    def _step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        batch, call = batch_and_call(step, args, kwargs)
        x = get(batch, find_input(batch, self.inputs))
        sandbox = Sandbox(module, trainer, x.device)
        try:
            if self._layout is None:
                self._layout = find_class_layout(self, module, call, batch, sandbox)
                where = place_text(self._layout.labels_path or ())
                what = type(self._layout.logits_module).__name__
                rank_zero_info(f"CertifiedTraining: bounds the logits of {what}, labels {where}.")
        except StepSkipped:
            return call(batch)
        victim = StepVictim(module, call, batch, self._layout, sandbox).training()
        progress = self._progress(trainer)

        def total(own: Tensor, first: bool = True) -> Tensor:
            return self._loss(trainer, module, victim, progress, own, first)

        with sandbox.replaying():
            if not module.automatic_optimization:
                with _seams.before_backward(module, total):
                    return call(batch)
            output = call(batch)
        own = loss_of(output)
        return output if own is None else with_loss(output, total(own))

    def _loss(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        victim: StepVictim,
        progress: float,
        own: Tensor,
        first: bool,
    ) -> Tensor:
        """The share of the own loss, and with the step's first one the bounds' part."""
        grown, weight = self.schedule(progress)
        if grown == 0 or weight == 1:
            return own
        if not first:
            return weight * own
        logits = bounded_logits(trainer, victim, self.threat.scaled(grown))
        labels = victim.known_labels()
        margins = self.verifier.training_margins(logits, labels, grown)
        _, truth = class_differences(logits, labels)
        loss = weight * own + (1 - weight) * worst_case_loss(margins, truth).mean()
        module.log("train/certified_loss", loss.detach(), prog_bar=True)
        module.log("train/verified_acc", are_positive(margins.detach(), truth).float().mean())
        return loss

    def _progress(self, trainer: pl.Trainer) -> float:
        """Share of the run that is over, by epochs or by steps, whichever ends first."""
        shares = []
        if (epochs := trainer.max_epochs or -1) > 0:
            batches = max(1.0, float(trainer.num_training_batches))
            within = 0.0 if batches == float("inf") else min(1.0, self._batch_idx / batches)
            shares.append((trainer.current_epoch + within) / epochs)
        if trainer.max_steps > 0:
            shares.append(trainer.global_step / trainer.max_steps)
        return min(1.0, max(shares, default=1.0))
