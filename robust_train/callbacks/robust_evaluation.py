"""Robust accuracy of an unmodified LightningModule, in every validation and test run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, fresh, get, label_candidates
from robust_train.callbacks._callback import Callback, call_text, place_text, plain, submodule
from robust_train.callbacks._checks import check_counts, check_name, check_one_place, check_places, check_texts
from robust_train.callbacks._layer import kind_of, layer_text
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, find_logits, loss_of
from robust_train.callbacks._testing import AtTest, Testing
from robust_train.evasion.attacks.base import Attack, what_holds
from robust_train.evasion.corruptions import Corruptions
from robust_train.evasion.evaluate import Verdicts, judge
from robust_train.evasion.examples import AdversarialExamples
from robust_train.evasion.outcomes import Evaluation
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl


class RobustEvaluation(Callback):
    """Attacks the model in ``fit``'s validation, in ``validate`` and in ``test``, and logs what is left of its
    accuracy.

    Before each evaluation step the batch's inputs are attacked through the user's own step; then the user's step runs
    on the clean batch as ever. Logged, with the prefix ``val/`` or ``test/``:

    * ``clean_acc``: accuracy on the examples that were attacked, before the attack;
    * ``robust_acc``: an example counts only if it is right when clean and under every attack;
    * ``robust_acc_<attack>``: the same for one attack alone. Examples that are wrong when clean are not attacked, and
      those that an attack has fooled leave it at once.

    Dense predictions (segmentation) count by the share of each example's positions that are right. Tasks without
    classes log ``clean_loss``, ``robust_loss`` and ``robust_loss_<attack>`` instead: the loss that the evaluation step
    returns, or else the training step's, in eval mode; worst case by batch, because only its mean is known.

    In ``test`` a classification is looked at more closely: afterwards ``evaluation`` has exact intervals, rates by
    class and by group, and named flags wherever the numbers are not to be trusted; see ``Evaluation``. With
    ``corruptions`` ``test/corruption_acc`` is logged, the mean accuracy under natural corruptions.

    Args:
        attacks: attacks by name, or one attack.
        threat: what the attacker may do; give the same as in training.
        every_n_epochs: in ``fit``: in every n-th epoch, as ModelCheckpoint counts them, and in the last one.
        limit_batches: attack only the first batches of each loader; None: all.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        layer: see ``AdversarialTraining``; give the same as in training.
        name: where two evaluations with different threats stand in one Trainer: part of the names,
            ``val/<name>/robust_acc``.
        seed: seed of the attacks' own random stream; the same in every epoch, so that epochs can be compared.
        groups: in ``test``: which part of the batch names each example's group.
        corruptions: in ``test``: natural corruptions to measure under; None: none.
        checks: in ``test``: look for signs that the numbers are not to be trusted, on the first 64 examples.
        draws: in ``test``: random passes a verdict, and samples of EOT around each attack; None: 1, or 10 where the
            model is found to draw at random.
        shards: in ``test``: folder for what each batch came to, so that the same test goes on where it stopped.
        examples: in ``test``: of how many of the first rows adversarial examples are kept, as ``adversarial_examples``.

    Raises:
        ValueError: a setting is out of range; in ``setup``: two evaluations with one name; with the first batch: no
            such input, or it lies outside of the threat's range.
        TypeError: an attack is none, or the input is not floating point.

    Note:
        As ``monitor="val/robust_acc"``: with ``every_n_epochs`` > 1 give ModelCheckpoint the same ``every_n_epochs``.
        For EarlyStopping, which wants a value after every validation, thin out validation itself instead:
        ``Trainer(check_val_every_n_epoch=n)``.

    Guarantees:
        Training with this callback is bit-identical to training without it. ``robust_acc`` never exceeds ``clean_acc``
        or any ``robust_acc_<attack>``.

    Example::

        trainer = Trainer(callbacks=[RobustEvaluation({"pgd": PGD(steps=50)}, Threat(eps="8/255"))])
        trainer.test(model, data)  # test/clean_acc, test/robust_acc, test/robust_acc_pgd
    """

    def __init__(
        self,
        attacks: Attack | Mapping[str, Attack],
        threat: Threat,
        every_n_epochs: int = 1,
        limit_batches: int | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        layer: str | None = None,
        name: str = "",
        seed: int = 0,
        groups: str | int | None = None,
        corruptions: Corruptions | None = None,
        checks: bool = True,
        draws: int | None = None,
        shards: str | None = None,
        examples: int = 0,
    ) -> None:
        if not isinstance(attacks, (Attack, Mapping)):
            raise TypeError(f"robust_evaluation.attacks must be an attack, or attacks by name, got {attacks!r}")
        self.attacks = {type(attacks).__name__.lower(): attacks} if isinstance(attacks, Attack) else dict(attacks)
        if not self.attacks:
            raise ValueError("robust_evaluation.attacks must hold at least one attack")
        for key, attack in self.attacks.items():
            if not isinstance(attack, Attack):
                raise TypeError(f"robust_evaluation.attacks.{key} must be a robust_train Attack, got {attack!r}")
            if attack.reach > 1:
                raise ValueError(
                    f"robust_evaluation.attacks.{key}: {call_text(attack)} leaves the ball by a factor of "
                    f"{attack.reach:g}; it is made for training. Evaluate with one that stays inside (project=true)"
                )
        if not isinstance(threat, Threat):
            raise TypeError(f"robust_evaluation.threat must be a robust_train Threat, got {threat!r}")
        for attack in self.attacks.values():
            attack.check(threat)
        batches = 1 if limit_batches is None else limit_batches
        check_counts("robust_evaluation", 1, every_n_epochs=every_n_epochs, limit_batches=batches)
        check_counts("robust_evaluation", 0, seed=seed)
        check_places("robust_evaluation", inputs=inputs, labels=labels)
        check_texts("robust_evaluation", logits=logits, layer=layer)
        check_one_place("robust_evaluation", inputs, layer)
        check_name("robust_evaluation", name)
        self.threat, self.every_n_epochs, self.limit_batches = threat, every_n_epochs, limit_batches
        self.inputs, self.labels, self.logits, self.name, self.seed = inputs, labels, logits, name, seed
        self.layer, self._asked = layer, AtTest(groups, corruptions, checks, draws, shards, examples)
        self.evaluation: Evaluation | None = None
        self.adversarial_examples: AdversarialExamples | None = None
        self._testing: Testing | None = None
        self._means: dict[str, MeanMetric] = {}
        self._active = False
        self._model: _HowToCall | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def settings(self) -> dict[str, Any]:
        names = (
            "attacks",
            "threat",
            "every_n_epochs",
            "limit_batches",
            "inputs",
            "labels",
            "logits",
            "layer",
            "name",
            "seed",
        )
        asked = {f.name: plain(getattr(self._asked, f.name)) for f in fields(self._asked)}
        return {name: plain(getattr(self, name)) for name in names} | asked

    @property
    def active(self) -> bool:
        """Whether the validation or test that runs now is attacked (see ``every_n_epochs``)."""
        return self._active

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        twins = [c for c in trainer.callbacks if isinstance(c, RobustEvaluation) and c.name == self.name]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise ValueError(
                f"two RobustEvaluation callbacks with name={self.name!r} would write the same metrics: give each "
                "a name of its own, or one callback all attacks"
            )
        if stage in ("fit", "validate", "test"):
            attacks = ", ".join(f"{name}: {call_text(attack)}" for name, attack in self.attacks.items())
            within = what_holds(self.attacks.values(), self.threat, self.layer)
            self.announce(trainer, f"active in {getattr(stage, 'value', stage)}. {attacks}; within the {within}.")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        in_fit = trainer.state.fn == "fit"
        last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0 or last
        self._begin(not in_fit or trainer.sanity_checking or due)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(True)
        self.evaluation = self.adversarial_examples = None
        self._testing = Testing(self._asked, self.threat, self.attacks, self.seed, self.layer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, batch_idx, dataloader_idx, "validation")

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(trainer, pl_module, batch, batch_idx, dataloader_idx, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "test")
        if self._testing is not None and (found := self._testing.evaluation(trainer)):
            self.evaluation, self.adversarial_examples = found, self._testing.examples
            name = f" {self.name}" if self.name else ""
            rank_zero_info(f"RobustEvaluation{name}: " + "\n  ".join(str(found).splitlines()))
        self._testing = None

    # --- work -----------------------------------------------------------------------------------------------------

    def _begin(self, active: bool) -> None:
        self._active, self._means, self._model = active, {}, None

    def _evaluate(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, loader_idx: int, stage: str
    ) -> None:
        if not self._active or (self.limit_batches is not None and batch_idx >= self.limit_batches):
            return
        # Lightning evaluates in inference mode, whose tensors no gradient can pass: leave it, and copy the batch
        with torch.inference_mode(False), torch.enable_grad(), _seams.autocast_context(trainer, stage):
            batch = fresh(batch)
            input_path = find_input(batch, self.inputs)
            sandbox = Sandbox(module, trainer, get(batch, input_path).device)

            def victim(how: _HowToCall) -> StepVictim:
                classes = how.layout.logits_module is not None
                return kind_of(how.layout)(
                    module,
                    lambda b: how.step(b, *_seams.step_arguments(how.step, batch_idx, loader_idx)),
                    batch,
                    how.layout,
                    sandbox,
                    own_loss=not classes,
                    gradient_scale=_seams.gradient_scale(trainer),
                    stop_when_fooled=classes and not _seams.sharded(trainer),
                )

            seed = (self.seed, _seams.data_rank(trainer), loader_idx, batch_idx)
            try:
                if self._model is None:
                    candidates = label_candidates(batch, input_path, self.labels)
                    layer = None if self.layer is None else submodule(module, self.layer, "layer")
                    layout = Layout(
                        input_path,
                        candidates[0] if candidates else None,
                        candidates=candidates,
                        layer=layer,
                        layer_name=self.layer or "",
                    )
                    self._look_at(victim(_HowToCall(getattr(module, f"{stage}_step"), layout)), stage)
                    self._model = self._how_to_call(module, stage, layout, victim)
                attacked = victim(self._model)
                x = self._look_at(attacked, stage)
                threat = attacked.within(self.threat)
                if stage == "test" and self._testing and {"logits", "labels"} <= attacked.provides:
                    place = (loader_idx, batch_idx)
                    values = self._testing.judge(trainer, module, attacked, x, threat, place)
                else:
                    values = _values(judge(attacked, x, threat, self.attacks, *seed))
            except StepSkipped:
                return
        self._record(values, len(x))

    def _look_at(self, victim: StepVictim, stage: str) -> Tensor:
        """The inputs that are attacked, checked against the threat's range."""
        x = victim.clean()
        place = f"the {stage} batch's input {place_text(victim.layout.input_path)}"
        self.threat.check_input(x, place if self.layer is None else layer_text(self.layer))
        return x

    def _how_to_call(
        self, module: pl.LightningModule, stage: str, layout: Layout, victim: Callable[[_HowToCall], StepVictim]
    ) -> _HowToCall:
        """With the first batch: whether the task has classes, and whose output are the logits. Says what it found."""
        step = getattr(module, f"{stage}_step")
        named = None if self.logits is None else submodule(module, self.logits)
        if found := find_logits(victim(_HowToCall(step, layout)), module, named):
            where = place_text(found.labels_path or ())
            rank_zero_info(f"RobustEvaluation: logits of {type(found.logits_module).__name__}, labels {where}.")
            return _HowToCall(step, found)
        needy = [name for name, attack in self.attacks.items() if "logits" in attack.needs]
        if needy or self.labels is not None:
            raise ValueError(
                f"{', '.join(needy) or 'labels=' + repr(self.labels)}: class labels are needed with logits that fit "
                f"them, and none were found in {stage}_step: name the submodule that returns the logits with "
                'logits="…" and the labels with labels="…"; for a task without classes leave both out, and use PGD'
            )
        # a task without classes: the loss of this step where it returns one, else that of the unwrapped training step
        plain_victim = victim(_HowToCall(step, layout))
        returned = plain_victim.output(plain_victim.clean())
        if loss_of(returned) is None:
            if not module.automatic_optimization and not module.trainer.optimizers:
                raise ValueError(
                    f"{stage}_step returns no loss, and training_step, which optimizes by hand, cannot run outside of "
                    f'fit: return the loss from {stage}_step, or name the submodule that returns logits with logits="…"'
                )
            step = getattr(module.training_step, "__wrapped__", module.training_step)
        rank_zero_info(f"RobustEvaluation: found no classes, so the loss of {step.__name__} is attacked and logged.")
        return _HowToCall(step, layout)

    def _record(self, values: Mapping[str, Tensor], size: int) -> None:
        for name, value in values.items():
            mean = self._means.setdefault(name, MeanMetric().to(value.device))
            mean.update(value.float(), weight=torch.ones_like(value) if value.ndim else float(size))

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, prefix: str) -> None:
        if not self._active or trainer.sanity_checking:
            return
        prefix = f"{prefix}/{self.name}" if self.name else prefix
        for name, mean in self._means.items():
            shown = name in ("robust_acc", "robust_loss")
            # compute() has already reduced over the ranks
            module.log(f"{prefix}/{name}", mean.compute(), prog_bar=shown, add_dataloader_idx=False)


@dataclass(frozen=True)
class _HowToCall:
    """Which step is evaluated, and where its input, labels and logits are."""

    step: Callable[..., Any]
    layout: Layout


def _values(verdicts: Verdicts) -> dict[str, Tensor]:
    """What is logged of a batch, by name."""
    kind = "loss" if verdicts.is_loss else "acc"
    values = {f"clean_{kind}": verdicts.clean, f"robust_{kind}": verdicts.worst}
    return values | {f"robust_{kind}_{name}": value for name, value in verdicts.attacked.items()}
