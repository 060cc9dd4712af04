"""An attack within each ball of a threat of several norms: the worst of them, or one by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.pgd import PGD
from robust_train.evasion.threat import Threat
from robust_train.evasion.threat_union import members_of
from robust_train.evasion.victim import Victim, classification_loss

CHOICES = ("worst", "random")


def worst_of_threats(
    victim: Victim, x: Tensor, threats: Sequence[Threat], *, attack: Attack, generator: torch.Generator
) -> Tensor:
    """Run an attack within each threat and keep, of each example, what hurts most.

    Args:
        victim: the model under attack, with logits and labels.
        x: clean inputs ``(B, ...)``.
        threats: at least one.
        attack: what to run.
        generator: source of all randomness.

    Returns:
        Of each example the candidate with the highest cross-entropy; where ``victim.stop_when_fooled``, the first that
        is misclassified, and examples that are fooled within one threat are spared the next. ``(B, ...)``.
    """
    best, best_loss = x.clone(), None
    alive = torch.arange(len(x), device=x.device)
    for threat in threats:
        part = victim if len(alive) == len(x) else victim.take(alive)
        here = attack(part, x[alive], threat, generator)
        with torch.no_grad():
            if victim.stop_when_fooled:
                best[alive] = here
                alive = alive[part.score(here) > 0]
                if len(alive) == 0:
                    break
                continue
            loss = classification_loss(victim.logits(here), victim.known_labels()).float()
        better = torch.ones_like(loss, dtype=torch.bool) if best_loss is None else loss > best_loss
        best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), here, best)
        best_loss = loss if best_loss is None else torch.maximum(loss, best_loss)
    return best


@dataclass(frozen=True)
class EachThreat(Attack):
    """Another attack, within each ball of a ``ThreatUnion``; within a plain threat it is that attack.

    For training on several norms: ``"worst"`` is Tramèr and Boneh's "max" strategy, ``"random"`` takes one ball for
    each batch, at the price of one. Their "avg" strategy is the callback ``AverageTraining``. For evaluation,
    ``"worst"`` counts an example only if it withstands all of them.

    Args:
        attack: what to run; None: ``PGD()``.
        choose: ``"worst"`` of all, example by example, or one at ``"random"``, batch by batch.

    Raises:
        ValueError: ``choose`` is neither.
        TypeError: ``attack`` is none.

    Reference:
        Tramèr & Boneh, "Adversarial Training and Robustness for Multiple Perturbations", 2019, section 4.
    """

    family: ClassVar[str] = "ensemble"

    attack: Attack = field(default_factory=PGD)
    choose: str = "worst"

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack) or isinstance(self.attack, EachThreat):
            raise TypeError(f"each_threat.attack must be another robust_train Attack, got {self.attack!r}")
        if self.choose not in CHOICES:
            raise ValueError(f"each_threat.choose must be one of {', '.join(CHOICES)}, got {self.choose!r}")

    @property
    def needs(self) -> frozenset[str]:
        return self.attack.needs | ({"logits", "labels"} if self.choose == "worst" else set())

    @property
    def reach(self) -> float:
        return self.attack.reach

    @property
    def passes(self) -> float:
        return self.attack.passes  # of one ball; how many there are is the threat's affair

    @property
    def starts_at_clean_input(self) -> bool:
        return self.attack.starts_at_clean_input

    def check(self, threat: Threat) -> None:
        for member in members_of(threat):
            self.attack.check(member)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        threats = members_of(threat)
        if self.choose == "random":
            pick = torch.randint(len(threats), (), generator=generator, device=generator.device)
            return self.attack(victim, x, threats[int(pick)], generator)
        return worst_of_threats(victim, x, threats, attack=self.attack, generator=generator)
