"""Defensive distillation of an unmodified LightningModule, always judged by attacks that know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, get
from robust_train.callbacks._bounds import find_class_layout
from robust_train.callbacks._callback import Callback, call_text, plain
from robust_train.callbacks._checks import check_counts, check_places, check_texts
from robust_train.callbacks._inner import fit_copy
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._side_by_side import SideBySide
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, batch_and_call, loss_of, with_loss
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.pgd import PGD
from robust_train.evasion.distillation import adapted_to_distillation, check_temperature, tempered_loss
from robust_train.evasion.gain import Gain
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import as_logits

if TYPE_CHECKING:
    import pytorch_lightning as pl

OTHERS = ("AdversarialTraining", "CertifiedTraining", "GaussianAugmentation", "DPSGD")


class _TemperedTraining(Callback):
    """Puts a loss at a temperature in the place of the step's own; the labels are the batch's, or a teacher's."""

    def __init__(
        self, threat: Threat, temperature: float, inputs: str | int | None, labels: str | int | None, logits: str | None
    ) -> None:
        self.threat, self.temperature = threat, temperature
        self.inputs, self.labels, self.logits = inputs, labels, logits
        self.weights: dict[str, Tensor] | None = None  # the teacher's
        self._layout: Layout | None = None
        self._unwrap: Callable[[], None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._unwrap is None:
            self._layout = None
            self._unwrap = _seams.wrap_training_step(
                pl_module, lambda step, *args, **kwargs: self._step(trainer, pl_module, step, args, kwargs)
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
        self._unwrap = None

    def _step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        batch, call = batch_and_call(step, args, kwargs)
        sandbox = Sandbox(module, trainer, get(batch, find_input(batch, self.inputs)).device)
        try:
            if self._layout is None:
                self._layout = find_class_layout(self, module, call, batch, sandbox)
            targets = self._targets(module, call, batch, self._layout, sandbox)
        except StepSkipped:
            return call(batch)
        seen: list[Tensor] = []
        with sandbox.replaying(), self._layout.watched(seen.append):
            output = call(batch)
        if loss_of(output) is None or not seen:
            return output
        loss = tempered_loss(as_logits(seen[0]), targets, self.temperature)
        module.log("train/distillation_loss", loss.detach(), prog_bar=True)
        return with_loss(output, loss)

    def _targets(
        self, module: pl.LightningModule, call: Callable[[Any], Any], batch: Any, layout: Layout, sandbox: Sandbox
    ) -> Tensor:
        """The batch's labels, or the teacher's class probabilities at the temperature."""
        if (weights := self.weights) is None:
            return StepVictim(module, call, batch, layout, sandbox).known_labels()

        def as_teacher(sent: Any) -> Any:
            module.load_state_dict(weights)  # what an extra call writes is undone by the sandbox
            return call(sent)

        teacher = StepVictim(module, as_teacher, batch, layout, sandbox, own_loss=False)
        with torch.no_grad():
            return (teacher.logits(get(batch, layout.input_path)) / self.temperature).softmax(1)


class _Memory(Callback):
    """The weights that a fit ends with."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}


class DefensiveDistillation(_TemperedTraining):
    """Trains a student on a teacher's softened predictions at a high temperature, and measures what that is worth.

    It hides gradients and removes no adversarial examples (Carlini & Wagner 2017). So each validation and test logs
    three robust accuracies: ``undefended/robust_acc`` (of the teacher), ``apparent/robust_acc`` and
    ``adaptive/robust_acc``, with ``apparent_gain`` and ``adaptive_gain``; and every ``RobustEvaluation`` in the Trainer
    attacks adaptively too: on logits over the temperature, and by APGD on the difference of logits ratio. Only the
    adaptive numbers count.

    The student's own loss is not used; its metrics are logged as ever.

    Args:
        threat: what the attacker may do.
        temperature: of teacher and student, 1 to 10,000; the trained model is used at 1.
        teacher: checkpoint of a trained module of the same class; None: a copy of the module is trained on the labels
            first, at the temperature, as long as the run.
        attack: the naive attack, of which the adaptive one is made; None: ``PGD(steps=50)``.
        every_n_epochs: in ``fit``: measure in every n-th epoch, and in the last one.
        limit_batches: measure only on the first batches of each loader; None: all.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        seed: of the teacher that is trained first.

    Raises:
        ValueError: a setting is out of range; in ``setup``: manual optimization, several processes or no last epoch
            without a teacher's checkpoint, one that does not fit, or a callback that it cannot stand beside.
        TypeError: ``threat`` or ``attack`` is of another kind.

    Guarantees:
        No key of the module's weights changes, and after ``fit`` the module has its own step again.

    Reference:
        Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks", 2016;
        broken in Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017, section IV.
    """

    defends = True
    at_test = True

    def __init__(
        self,
        threat: Threat,
        temperature: float = 20.0,
        teacher: str | None = None,
        attack: Attack | None = None,
        every_n_epochs: int = 1,
        limit_batches: int | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        seed: int = 0,
    ) -> None:
        attack = PGD(steps=50) if attack is None else attack
        for name, value, kind in (("threat", threat, Threat), ("attack", attack, Attack)):
            if not isinstance(value, kind):
                raise TypeError(f"defensive_distillation.{name} must be a robust_train {kind.__name__}, got {value!r}")
        check_temperature("defensive_distillation", temperature)
        batches = 1 if limit_batches is None else limit_batches
        check_counts("defensive_distillation", 1, every_n_epochs=every_n_epochs, limit_batches=batches)
        check_counts("defensive_distillation", 0, seed=seed)
        check_places("defensive_distillation", inputs=inputs, labels=labels)
        check_texts("defensive_distillation", logits=logits, teacher=teacher)
        super().__init__(threat, float(temperature), inputs, labels, logits)
        self.teacher, self.attack, self.seed = teacher, attack, seed
        self.every_n_epochs, self.limit_batches = every_n_epochs, limit_batches
        read = ("every_n_epochs", "limit_batches", "inputs", "labels", "logits")
        settings = {name: getattr(self, name) for name in read}
        self._measuring = SideBySide(attack, self.adapt, self.without, threat, settings, fairly=True)

    def adapt(self, attack: Attack, averaged: bool = False) -> Attack:
        """The attack as one makes it who knows of the distillation."""
        return adapted_to_distillation(attack, self.temperature)

    @contextmanager
    def without(self, module: Any) -> Iterator[None]:
        """Inside, the module has the teacher's weights."""
        own = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.weights or own)
        try:
            yield
        finally:
            module.load_state_dict(own)

    @property
    def gain(self) -> Gain | None:
        """What the last validation or test found."""
        return self._measuring.gain

    def settings(self) -> dict[str, Any]:
        names = ("threat", "temperature", "teacher", "attack", "every_n_epochs", "limit_batches")
        return {name: plain(getattr(self, name)) for name in (*names, "inputs", "labels", "logits", "seed")}

    def state(self) -> dict[str, Any]:
        weights = None if self.weights is None else {name: value.cpu() for name, value in self.weights.items()}
        return {"settings": self.settings(), "teacher": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["teacher"]

    # --- events -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if sum(isinstance(c, DefensiveDistillation) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("two DefensiveDistillation callbacks in one Trainer: keep one of them")
        if stage == "fit":
            self._refuse_what_cannot_work(trainer, pl_module)
            if self.teacher is not None:
                self.weights = _weights_of(self.teacher, pl_module)
            super().setup(trainer, pl_module, stage)
        self._measuring.adapt_others(trainer, getattr(stage, "value", stage))
        if stage in ("fit", "validate", "test"):
            teacher = "a teacher that is trained first" if self.teacher is None else f"teacher={self.teacher}"
            self.announce(
                trainer,
                f"active. Temperature {self.temperature:g}, {teacher}; judged by {call_text(self.attack)} made "
                f"adaptive, within the {self.threat.describe()}.",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.weights is not None:  # of a checkpoint, or of the run that is resumed
            return
        epochs = 1 if trainer.fast_dev_run else trainer.max_epochs or 1  # type: ignore[attr-defined]
        rank_zero_info(f"DefensiveDistillation: a teacher is trained for {epochs} epochs.")
        lesson = _TemperedTraining(self.threat, self.temperature, self.inputs, self.labels, self.logits)
        memory, loader = _Memory(), trainer.train_dataloader
        with _seams.generators_kept(loader, trainer.datamodule):  # type: ignore[attr-defined]
            fit_copy(trainer, pl_module, loader, epochs=epochs, seed=self.seed, callbacks=[lesson, memory])
        self.weights = memory.weights

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.weights is not None:
            self._measuring.start(trainer, pl_module, "validation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.weights is None:
            raise ValueError("DefensiveDistillation has no teacher to compare with: test with the callback that fitted")
        self._measuring.start(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.weights is not None:
            self._measuring.batch(trainer, pl_module, batch, (batch_idx, dataloader_idx), "validation")

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measuring.batch(trainer, pl_module, batch, (batch_idx, dataloader_idx), "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.weights is not None:
            self._measuring.end(trainer, pl_module, "validation")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measuring.end(trainer, pl_module, "test")

    def _remove(self) -> None:
        super()._remove()
        self._measuring.restore_others()

    def _refuse_what_cannot_work(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if name := next((kind.__name__ for kind in type(callback).__mro__ if kind.__name__ in OTHERS), None):
                raise ValueError(f"DefensiveDistillation and {name} in one Trainer train on different losses: keep one")
        if not pl_module.automatic_optimization:
            raise ValueError("DefensiveDistillation replaces the loss that is returned: use automatic optimization")
        if self.teacher is None and trainer.world_size > 1:
            raise ValueError(
                "DefensiveDistillation: a teacher that is trained first would differ from process to process: train it "
                "in a run of its own, and name its checkpoint with teacher=…"
            )
        if self.teacher is None and (trainer.max_epochs or -1) < 1:
            raise ValueError(
                "DefensiveDistillation trains its teacher for as many epochs as the run: set the Trainer's max_epochs, "
                "or name a checkpoint with teacher=…"
            )


def _weights_of(path: str, module: pl.LightningModule) -> dict[str, Tensor]:
    """Weights of a checkpoint, on the module's device.

    Raises:
        ValueError: there is no such file, or it is of another module.
    """
    try:
        content = torch.load(path, map_location=module.device, weights_only=True)
        weights = dict(content.get("state_dict", content))
        own = module.state_dict()
        if weights.keys() != own.keys() or any(weights[name].shape != own[name].shape for name in own):
            raise ValueError("its weights have other names or shapes")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"defensive_distillation.teacher={path!r} does not fit {type(module).__name__}: {reason}"
        ) from error
    return weights
