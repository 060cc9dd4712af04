"""Defensive distillation: softened labels, and the attacks that see past the gradients it hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.evasion.attacks._checks import is_number
from robust_train.evasion.attacks.apgd import APGD
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.worst_case import WorstCase
from robust_train.evasion.evaluate import judge
from robust_train.evasion.gain import Gain
from robust_train.evasion.margins import ScoreVictim
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import ClassifierVictim, Victim

HOTTEST = 1e4
DLR_STEPS = 50  # of the part of the adaptive attack that does not feel the logits' scale


def tempered_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of ``softmax(logits / temperature)``, times the temperature, a scalar.

    The factor keeps the size of the gradient; the optimum is the same.

    Args:
        logits: ``(B, classes)``.
        targets: class indices ``(B,)``, or class probabilities ``(B, classes)``.
        temperature: > 0.

    Reference:
        Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks", 2016,
        section IV.
    """
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets.long()
    return temperature * F.cross_entropy(logits / temperature, targets)


def check_temperature(name: str, temperature: object) -> float:
    """The temperature as a float.

    Raises:
        ValueError: it is no number from 1 to 10,000.
    """
    if not is_number(temperature) or not 1 <= float(temperature) <= HOTTEST:  # type: ignore[arg-type]
        raise ValueError(f"{name}.temperature must be from 1 to {HOTTEST:g}, got {temperature!r}")
    return float(temperature)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TemperedAttack(Attack):
    """Any attack on the cross-entropy of the logits over a temperature, whose gradients do not vanish.

    Args:
        attack: the attack within.
        temperature: 1 to 10,000; the one of the distillation.

    Raises:
        TypeError: ``attack`` is not an attack.
        ValueError: ``temperature`` is out of range.

    Reference:
        Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017, section IV.
    """

    family: ClassVar[str] = "ensemble"

    attack: Attack
    temperature: float = 20.0

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(f"tempered_attack.attack must be an attack, got {self.attack!r}")
        object.__setattr__(self, "temperature", check_temperature("tempered_attack", self.temperature))

    @property
    def needs(self) -> frozenset[str]:
        return self.attack.needs | {"logits", "labels"}

    @property
    def passes(self) -> float:
        return self.attack.passes

    def check(self, threat: Threat) -> None:
        self.attack.check(threat)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        def loss(scores: Tensor, truth: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(scores / self.temperature, truth, reduction="none")

        return self.attack(ScoreVictim(victim, loss), x, threat, generator)


def adapted_to_distillation(attack: Attack, temperature: float) -> WorstCase:
    """The attack as it is, on tempered logits, and APGD on a loss that does not feel their scale; the worst counts.

    Args:
        attack: that does not know of the distillation.
        temperature: of the distillation.
    """
    return WorstCase([attack, TemperedAttack(attack, temperature), APGD(steps=DLR_STEPS, loss="dlr")])


def distillation_gain(
    teacher: nn.Module,
    student: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    attack: Attack,
    *,
    temperature: float,
    seed: int = 0,
) -> Gain:
    """Measure what a distilled classifier gains over its teacher, against an attack that knows of it and one not.

    Args:
        teacher: ``x -> logits (B, classes)``, in eval mode. It is attacked adaptively, because it may have been trained
            at a temperature too.
        student: distilled from it, in eval mode.
        x: clean inputs ``(B, ...)``.
        y: class indices ``(B,)``.
        threat: what the attacker may do.
        attack: the naive attack.
        temperature: of the distillation.
        seed: of the attacks.

    Guarantees:
        The adaptive accuracy is never above the apparent one.
    """
    naive = {"naive": attack}
    adaptive = {**naive, "adaptive": adapted_to_distillation(attack, temperature)}

    def accuracy(model: nn.Module, attacks: dict[str, Attack]) -> float:
        victim = ClassifierVictim(model, y, stop_when_fooled=True)
        return float(judge(victim, x, threat, attacks, seed).worst.mean())

    return Gain(accuracy(teacher, adaptive), accuracy(student, naive), accuracy(student, adaptive), len(x))
