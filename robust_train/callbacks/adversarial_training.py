"""Adversarial training of an unmodified LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import Path, find_input, get, label_candidates
from robust_train.callbacks._callback import Callback, call_text, place_text, plain, submodule
from robust_train.callbacks._checks import check_counts, check_one_place, check_places, check_texts, refuse_beside
from robust_train.callbacks._layer import kind_of, layer_text
from robust_train.callbacks._sandbox import MODES, Sandbox
from robust_train.callbacks._step import (
    Layout,
    StepSkipped,
    StepVictim,
    batch_and_call,
    find_logits,
    loss_of,
    with_loss,
)
from robust_train.evasion.attacks.base import Attack, what_holds
from robust_train.evasion.objectives.awp import AWP
from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.objectives.pgd_at import PGDAT
from robust_train.evasion.randomness import generator_for
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import as_logits

if TYPE_CHECKING:
    import pytorch_lightning as pl

WARMUPS = ("eps", "steps", "both")


class AdversarialTraining(Callback):
    """Trains a model on adversarial examples of itself; the module, its data and its Trainer stay as they are.

    In ``fit`` every call of ``training_step`` is preceded by an attack on the step's own loss, so any task works whose
    loss can be differentiated in its input. The order of work for one batch::

        on_train_batch_start
        training_step:                     # inside autocast and inside DistributedDataParallel.forward
            x_adv = attack(own loss, x)    # extra calls of the step, which leave no trace
            output = training_step(batch with x_adv, or with x: as the objective says)
            loss = own_weight * output + the objective's part   # train/adv_loss
        backward, optimizer step, …        # untouched

    Args:
        attack: how examples are found, for example ``PGD(steps=10)``.
        threat: what the attacker may do.
        objective: what is trained on; None: ``PGDAT()``, the adversarial batch in place of the clean one.
        inputs: which part of the batch is attacked: an index, a name, or a dotted path (``"views.0"``). None: a tensor
            named like an input (``x``, ``image``, …), else the first tensor with at least two dimensions, else the
            first tensor.
        labels: where the labels are, for what needs them (targeted attacks, torchattacks); None: the first that fits
            the logits of tensors named like labels, of integer tensors, and of the others.
        logits: name of the submodule whose output are the logits (``"net.head"``), for what needs them (TRADES,
            targeted attacks, torchattacks); None: what ``self(...)`` returns in the step, else what the last of the
            step's modules does.
        layer: name of a submodule (``"net.embedding"``) whose output is attacked instead of a part of the batch, for
            inputs that are discrete: the threat is in units of that output. It is called once a step, returns a tensor
            ``(B, ...)``, and is computed as ever, the perturbation added; padding of an ``nn.Embedding`` with
            ``padding_idx`` is not perturbed. None: the batch.
        mode: how the model behaves while examples are crafted. ``"eval"``: no dropout, running statistics of batch
            normalisation; ``"batch"``: no dropout, statistics of the batch, running statistics untouched; ``"train"``:
            as in training. Layers only: the LightningModule itself stays in training mode.
        warmup_epochs: epochs over which the attack grows to full strength, linearly.
        warmup: what grows: ``"eps"``, ``"steps"`` or ``"both"``. Override ``schedule`` for anything else.
        seed: seed of the attacks' own random stream; None: the run's (``seed_everything``).

    Raises:
        ValueError: a setting is out of range. In ``setup``: what cannot be combined. With the first batch, before
            anything is trained: the batch has no such input, or it lies outside of the threat's range (data that the
            pipeline normalised, with no ``mean`` and ``std`` in the threat).
        TypeError: ``attack``, ``threat`` or ``objective`` is of another kind, or the input is not floating point.

    Note:
        Known limits. Only layers are switched to eval mode: ``F.dropout(x, p, self.training)`` in a module that has
        children stays active while examples are crafted. Steps that differentiate in their parameters themselves (MAML)
        find them frozen while examples are crafted. Reentrant activation checkpointing cannot be differentiated by
        input alone: use ``use_reentrant=False``. What a step writes outside of its module (to the Trainer, to classes,
        to globals) is written by every extra call too. BatchNorm's running statistics are those of the inputs that the
        objective trains on. While examples are crafted there is a second copy of the parameters in memory.

    Guarantees:
        With ``PGDAT()`` and ``eps = 0`` the run is bit-identical to one without the callback: weights, buffers, Python
        attributes of the module, logged metrics, in every mode. Ranks of a distributed run keep equal weights. The
        batch and the dataset are never written to. No checkpoint key changes. After ``fit``, also a failed one, the
        module is as before.

    Example::

        trainer = Trainer(callbacks=[AdversarialTraining(PGD(steps=10), Threat(eps="8/255"))])
    """

    defends = True

    def __init__(
        self,
        attack: Attack,
        threat: Threat,
        objective: Objective | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        layer: str | None = None,
        mode: str = "eval",
        warmup_epochs: int = 0,
        warmup: str = "eps",
        seed: int | None = None,
    ) -> None:
        objective = PGDAT() if objective is None else objective
        for name, value, kind in (
            ("attack", attack, Attack),
            ("threat", threat, Threat),
            ("objective", objective, Objective),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"adversarial_training.{name} must be a robust_train {kind.__name__}, got {value!r}")
        for name, value, choices in (("mode", mode, MODES), ("warmup", warmup, WARMUPS)):
            if value not in choices:
                raise ValueError(f"adversarial_training.{name} must be one of {', '.join(choices)}, got {value!r}")
        check_counts("adversarial_training", 0, warmup_epochs=warmup_epochs, seed=0 if seed is None else seed)
        check_places("adversarial_training", inputs=inputs, labels=labels)
        check_texts("adversarial_training", logits=logits, layer=layer)
        check_one_place("adversarial_training", inputs, layer)
        if warmup_epochs and warmup != "eps" and not hasattr(attack, "steps"):
            raise ValueError(
                f'adversarial_training.warmup="{warmup}": {call_text(attack)} has no steps that could grow; use '
                'warmup="eps", or override schedule'
            )
        self.attack, self.threat, self.objective = attack, threat, objective
        self.check_attack(attack)
        self.inputs, self.labels, self.logits, self.layer, self.mode = inputs, labels, logits, layer, mode
        self.warmup_epochs, self.warmup, self.seed = warmup_epochs, warmup, seed
        self._unwrap: Callable[[], None] | None = None
        self._run = _Run()

    # --- what a subclass may change -------------------------------------------------------------------------------

    def schedule(self, attack: Attack, threat: Threat, epoch: int, step: int) -> tuple[Attack, Threat]:
        """Attack and threat for one batch; override for a curriculum of your own.

        Args:
            attack: as configured.
            threat: as configured.
            epoch: ``trainer.current_epoch``.
            step: ``trainer.global_step``.

        Returns:
            What this batch is attacked with. By default the warm-up: in epoch e of w the share ``(e + 1) / (w + 1)``.
        """
        share = min(1.0, (epoch + 1) / (self.warmup_epochs + 1))
        if share < 1.0 and self.warmup in ("eps", "both"):
            threat = threat.scaled(share)
        steps = getattr(attack, "steps", None)
        if share < 1.0 and self.warmup in ("steps", "both") and steps is not None and is_dataclass(attack):
            attack = replace(attack, steps=max(1, round(share * steps)))  # type: ignore[call-arg]
        return attack, threat

    def settings(self) -> dict[str, Any]:
        names = (
            "attack",
            "threat",
            "objective",
            "inputs",
            "labels",
            "logits",
            "layer",
            "mode",
            "warmup_epochs",
            "warmup",
            "seed",
        )
        return {name: plain(getattr(self, name)) for name in names}

    def perturbed(
        self, victim: StepVictim, x: Tensor, attack: Attack, threat: Threat, generator: torch.Generator
    ) -> Tensor:
        """Adversarial inputs for one batch; override for another way of finding them.

        Args:
            victim: the step under attack.
            x: clean inputs ``(B, ...)``.
            attack: what ``schedule`` returned.
            threat: likewise.
            generator: source of all randomness.
        """
        return attack(self.objective.attacked(victim, x), x, threat, generator)

    def weight_of_own(self, victim: StepVictim) -> float:
        """Factor on the user's own loss of one batch."""
        return self.objective.weight_of_own(victim)

    def part(self, victim: StepVictim, crafted: Crafted, logits: Tensor | None) -> Tensor | None:
        """The objective's part of the loss of one batch; override for another one.

        Args:
            victim: the step in training mode, with gradients to the parameters.
            crafted: the batch and what was found for it.
            logits: of the user's own forward pass, where the objective uses them.
        """
        part = self.objective.part(victim, crafted.x, crafted.x_adv, logits)
        penalty = self.objective.penalty(victim, crafted.x, crafted.threat, crafted.generator)
        return part if penalty is None else penalty if part is None else part + penalty

    def check_attack(self, attack: Attack) -> None:
        """Refuse an attack that cannot work within the threat or on the objective's loss.

        Raises:
            ValueError: the message says why.
        """
        name = type(self.objective).__name__
        if self.objective.replaces_loss and attack.needs - {"loss"}:
            raise ValueError(
                f"{name} has a loss of its own to be attacked, and {call_text(attack)} chooses its own from logits and "
                "labels: use PGD or FGSM, untargeted"
            )
        if self.objective.replaces_loss and attack.starts_at_clean_input:
            raise ValueError(
                f"{name} attacks a loss that has no gradient at the clean input, where this {type(attack).__name__} "
                "starts: give it a random start (PGD: random_start=true, FGSM: noise=1)"
            )
        attack.check(self.threat)

    def switch(self, attack: Attack) -> None:
        """Attack with something else from the next batch on, until the fit ends."""
        self.check_attack(attack)
        self._run.attack, self._run.layout = attack, None

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self._unwrap is not None:
            return
        self._refuse_what_cannot_work(trainer, pl_module)
        self._run = _Run(seed=torch.initial_seed() if self.seed is None else self.seed)
        self._unwrap = _seams.wrap_training_step(
            pl_module, lambda step, *args, **kwargs: self._step(trainer, pl_module, step, args, kwargs)
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        passes = self.attack.passes
        cost = (2 * passes + 3 * (1 + self.objective.extra_passes)) / 3
        self.announce(
            trainer,
            f"active. {call_text(self.attack)} within the {what_holds([self.attack], self.threat, self.layer)}; "
            f"objective {call_text(self.objective)}; examples are crafted in {self.mode} mode. "
            f"Expect about {cost:.1f} x the time of standard training.",
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run.look_closely = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._run.batch_idx, self._run.crafted = batch_idx, None
        self._run.look_closely |= batch_idx == 0  # DPSGD's checks may have crafted examples of their own before

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run.weights.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        self._run.weights.close()
        if self._unwrap is not None:
            self._unwrap()
        self._unwrap = None
        self._run = _Run(seed=self._run.seed)

    def state(self) -> dict[str, Any]:
        return {"seed": self._run.seed, "settings": self.settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.seed is None:
            self._run.seed = state_dict["seed"]

    # --- refusals -------------------------------------------------------------------------------------------------

    def _refuse_what_cannot_work(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if sum(isinstance(c, AdversarialTraining) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "two AdversarialTraining callbacks in one Trainer would attack each other's batches: keep one, and "
                "give it attack=WorstCase([...]) for several attacks"
            )
        if isinstance(self.objective, AWP) and self.objective.gamma:
            why = "the perturbed weights make every example's gradient depend on the others. Use another objective"
            refuse_beside(trainer, "DPSGD", "AWP", why)
        if reason := _seams.unsupported_strategy(trainer):
            raise ValueError(f"AdversarialTraining cannot work with {reason}")
        if _seams.takes_iterator(pl_module):
            raise ValueError(
                "AdversarialTraining cannot see the batch of a training_step(self, dataloader_iter): take "
                "training_step(self, batch, batch_idx) instead"
            )
        epochs = trainer.max_epochs
        if epochs is not None and 0 < epochs <= self.warmup_epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"adversarial_training.warmup_epochs={self.warmup_epochs} lasts as long as max_epochs={epochs}, so "
                "that the attack would never reach its strength: train for more epochs, or shorten it"
            )
        if self.logits is not None:
            submodule(pl_module, self.logits)
        if self.layer is not None:
            submodule(pl_module, self.layer, "layer")

    # --- one batch ------------------------------------------------------------------------------------------------

    def _step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        run = self._run
        batch, call = batch_and_call(step, args, kwargs)
        crafted = run.crafted
        if crafted is None or crafted.batch is not batch:  # an optimizer with a closure comes here again
            crafted = run.crafted = self._craft(trainer, module, call, batch)
        if crafted.victim is None:
            return self._skip(module, call, crafted)
        return self._train(module, call, crafted, crafted.victim.training())

    def _skip(self, module: pl.LightningModule, call: Callable[[Any], Any], crafted: Crafted) -> Any:
        """The extra calls found a step that skips this batch; the real one must too, or it would train undefended."""

        def refuse(*_: Any) -> Tensor:
            raise RuntimeError(
                "the training step returned no loss when it was attacked but trains now: what it does must not depend "
                "on how often it was called, or logits=… names a submodule that it does not call"
            )

        with crafted.sandbox.replaying(), _seams.before_backward(module, refuse):
            output = call(crafted.batch)
        return output if loss_of(output) is None or not module.automatic_optimization else refuse()

    def _craft(
        self, trainer: pl.Trainer, module: pl.LightningModule, call: Callable[[Any], Any], batch: Any
    ) -> Crafted:
        run = self._run
        input_path = find_input(batch, self.inputs) if run.layout is None else run.layout.input_path
        sandbox = Sandbox(module, trainer, get(batch, input_path).device)
        x = x_adv = get(batch, input_path)
        try:
            if run.layout is None:
                run.layout = self._look_at_first_batch(module, call, batch, input_path, sandbox)
            scale = _seams.gradient_scale(trainer)
            kind = kind_of(run.layout)
            victim = kind(module, call, batch, run.layout, sandbox, mode=self.mode, gradient_scale=scale)
            x = victim.clean()
            if run.look_closely or not x.is_floating_point():
                self.threat.check_input(x, self._place(input_path))
            victim.gradients = [] if run.look_closely and self.threat.radius > 0 else None
            attack = self.attack if run.attack is None else run.attack
            attack, threat = self.schedule(attack, self.threat, trainer.current_epoch, trainer.global_step)
            seed = (run.seed or 0, _seams.data_rank(trainer), trainer.current_epoch, run.batch_idx)
            threat, generator = victim.within(threat), generator_for(x.device, *seed)
            x_adv = self.perturbed(victim, x, attack, threat, generator)
            crafted = Crafted(batch, x, x_adv, threat, generator, sandbox, victim)
        except StepSkipped:
            crafted = Crafted(batch, x, x, self.threat, torch.Generator(x.device), sandbox, None)
        if run.look_closely and crafted.victim is not None and crafted.victim.gradients:
            if not any(map(bool, crafted.victim.gradients)):
                rank_zero_warn(
                    "AdversarialTraining: the gradient of the loss in the input is zero or not finite for a whole "
                    "batch, so no attack can find anything: is the loss saturated, or too small for this precision?"
                )
            crafted.victim.gradients = None
        run.look_closely = False
        return crafted

    def _look_at_first_batch(
        self, module: pl.LightningModule, call: Callable[[Any], Any], batch: Any, input_path: Path, sandbox: Sandbox
    ) -> Layout:
        """Where the labels are, and whose output the logits are; the latter only where something needs it."""
        candidates = label_candidates(batch, input_path, self.labels)
        layer = None if self.layer is None else submodule(module, self.layer, "layer")
        found: Layout | None = Layout(
            input_path,
            candidates[0] if candidates else None,
            candidates=candidates,
            layer=layer,
            layer_name=self.layer or "",
        )
        victim = kind_of(found)(module, call, batch, found, sandbox, mode=self.mode)
        x = victim.clean()
        self.threat.check_input(x, self._place(input_path))
        rank_zero_info(f"AdversarialTraining: attacks {self._place(input_path)}, {tuple(x.shape)}.")
        attack = self.attack if self._run.attack is None else self._run.attack
        if self.logits is None and "logits" not in self.objective.needs | attack.needs:
            return found
        named = None if self.logits is None else submodule(module, self.logits)
        found = find_logits(victim, module, named)
        if found is None:
            raise ValueError(
                f"{type(self.objective).__name__} with {type(attack).__name__} needs logits and class labels, and "
                "none were found in the training step: name the submodule that returns the logits with "
                'logits="…" and the labels with labels="…", or use PGDAT with PGD, which need neither'
            )
        return found

    def _place(self, input_path: Path) -> str:
        """What is attacked, in words."""
        return f"the batch's input {place_text(input_path)}" if self.layer is None else layer_text(self.layer)

    def _train(
        self, module: pl.LightningModule, call: Callable[[Any], Any], crafted: Crafted, victim: StepVictim
    ) -> Any:
        """The user's own step, once, on what the objective asks for; and the objective's part of the loss."""
        objective, layout, seen = self.objective, victim.layout, []
        weight = self.weight_of_own(victim)

        def total(own: Tensor, first: bool = True) -> Tensor:
            own = own if weight == 1.0 else own * weight
            if not first:
                return own
            part = self.part(victim, crafted, as_logits(seen[0]) if seen else None)
            loss = own if part is None else own + part
            module.log("train/adv_loss", loss.detach(), prog_bar=True)
            return loss

        x = crafted.x_adv if objective.trains_on == "adversarial" else crafted.x
        with ExitStack() as stack:
            batch = stack.enter_context(victim.trained_on(x))
            weights = stack.enter_context(ExitStack())
            weights.enter_context(objective.weights(victim, crafted.x, crafted.x_adv))
            stack.enter_context(crafted.sandbox.replaying())
            if objective.uses_logits:
                stack.enter_context(layout.watched(seen.append))
            if not module.automatic_optimization:
                stack.enter_context(_seams.before_backward(module, total, weights.close))
                return call(batch)
            output = call(batch)
            own = loss_of(output)
            if own is None:
                return output
            output = with_loss(output, total(own))
            self._run.weights = weights.pop_all()  # the backward pass may compute parts of the forward pass again
            return output


@dataclass(frozen=True)
class Crafted:
    """One batch and what was found for it.

    Attributes:
        batch: the user's.
        x: its clean inputs ``(B, ...)``.
        x_adv: adversarial inputs, same shape.
        threat: within which they were found.
        generator: what they were drawn from.
        sandbox: for extra calls of the step.
        victim: the step; None where it skips this batch.
    """

    batch: Any
    x: Tensor
    x_adv: Tensor
    threat: Threat
    generator: torch.Generator
    sandbox: Sandbox
    victim: StepVictim | None


class _Run:
    """What is known during one ``fit``."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.batch_idx = 0
        self.crafted: Crafted | None = None
        self.layout: Layout | None = None
        self.attack: Attack | None = None  # in place of the one that was asked for
        self.weights = ExitStack()  # closed when the loss was differentiated
        self.look_closely = True  # the first batch of an epoch is checked against the threat's range
