"""Adversarial training on several norms at once, each with its share of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_train.callbacks._step import StepVictim
from robust_train.callbacks.adversarial_training import AdversarialTraining, Crafted
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.each_threat import EachThreat
from robust_train.evasion.objectives.awp import AWP
from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.objectives.free_lb import FreeLB
from robust_train.evasion.threat import Threat
from robust_train.evasion.threat_union import ThreatUnion, members_of


class AverageTraining(AdversarialTraining):
    """Trains on the adversarial examples of every ball of a ``ThreatUnion``, with the mean of their losses.

    The "avg" strategy of Tramèr and Boneh; for their "max", and for one ball at random, give ``AdversarialTraining``
    the attack ``EachThreat``. Judge it with ``RobustEvaluation(EachThreat(PGD(steps=50)), threat)``.

    Args:
        attack: run within each ball, for example ``PGD(steps=10)``.
        threat: the balls.
        objective: see ``AdversarialTraining``; not AWP or FreeLB, which work with one batch of adversarial examples.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        mode: see ``AdversarialTraining``.
        warmup_epochs: see ``AdversarialTraining``; all radii grow alike.
        warmup: see ``AdversarialTraining``.
        seed: see ``AdversarialTraining``.

    Raises:
        ValueError: see ``AdversarialTraining``; the objective is AWP or FreeLB.
        TypeError: the threat is no ``ThreatUnion``.

    Reference:
        Tramèr & Boneh, "Adversarial Training and Robustness for Multiple Perturbations", 2019, section 4.1.
    """

    def __init__(
        self,
        attack: Attack,
        threat: ThreatUnion,
        objective: Objective | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        mode: str = "eval",
        warmup_epochs: int = 0,
        warmup: str = "eps",
        seed: int | None = None,
    ) -> None:
        if not isinstance(threat, ThreatUnion):
            raise TypeError(f"average_training.threat must be a ThreatUnion, of balls of several norms, got {threat!r}")
        if isinstance(attack, EachThreat):
            raise ValueError(
                "average_training.attack runs within each ball by itself: give the attack inside EachThreat"
            )
        if isinstance(objective, (AWP, FreeLB)):
            raise ValueError(
                f"AverageTraining has a batch of adversarial examples for each norm, and {type(objective).__name__} "
                'works with those of one: use AdversarialTraining with EachThreat(choose="worst")'
            )
        super().__init__(
            attack,
            threat,
            objective,
            inputs=inputs,
            labels=labels,
            logits=logits,
            mode=mode,
            warmup_epochs=warmup_epochs,
            warmup=warmup,
            seed=seed,
        )
        self._others: list[Tensor] = []

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "layer"}

    def perturbed(
        self, victim: StepVictim, x: Tensor, attack: Attack, threat: Threat, generator: torch.Generator
    ) -> Tensor:
        found = [super(AverageTraining, self).perturbed(victim, x, attack, t, generator) for t in members_of(threat)]
        first, *self._others = found
        return first

    def weight_of_own(self, victim: StepVictim) -> float:
        shares = len(members_of(self.threat)) if self.objective.trains_on == "adversarial" else 1
        return self.objective.own_weight / shares

    def part(self, victim: StepVictim, crafted: Crafted, logits: Tensor | None) -> Tensor | None:
        objective, x = self.objective, crafted.x
        parts = [objective.part(victim, x, crafted.x_adv, logits)]
        for x_adv in self._others:
            if objective.trains_on == "clean":  # the user's own loss is on clean inputs, and is there already
                parts.append(objective.part(victim, x, x_adv, logits))
                continue
            own, theirs = victim.loss_and_logits(x_adv) if objective.uses_logits else (victim.loss(x_adv), None)
            parts += [objective.own_weight * own.mean(), objective.part(victim, x, x_adv, theirs)]
        known = [part for part in parts if part is not None]
        total = torch.stack(known).sum() / (1 + len(self._others)) if known else None
        penalties = [objective.penalty(victim, x, t, crafted.generator) for t in members_of(crafted.threat)]
        known = [penalty for penalty in penalties if penalty is not None]
        penalty = torch.stack(known).mean() if known else None
        return penalty if total is None else total if penalty is None else total + penalty
