"""Auto-PGD towards one wrong class after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.apgd import apgd
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.margins import ScoreVictim, likeliest_wrong_classes, targeted_dlr_loss
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim


def apgd_targeted(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    targets: int = 9,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximise the targeted difference of logits ratio, for each of the likeliest wrong classes in turn.

    Args:
        victim: the model under attack; it needs logits ``(B, classes)`` and labels.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        steps: gradient steps a run, >= 1.
        targets: wrong classes, those with the highest scores at ``x`` first; fewer where there are fewer.
        restarts: runs a target.
        generator: source of the starts; None: a fresh one with seed 0.

    Returns:
        See ``apgd``.
    """
    wrong = likeliest_wrong_classes(victim, x, targets)
    goals = [ScoreVictim(victim, targeted_dlr_loss, target) for target in wrong.T for _ in range(restarts)]
    return apgd(goals, x, threat, steps=steps, generator=generator)


@dataclass(frozen=True)
class APGDT(Attack):
    """Auto-PGD on the targeted difference of logits ratio.

    Args:
        steps: gradient steps a run, >= 1.
        targets: wrong classes tried, the likeliest first, >= 1; fewer where the task has fewer.
        restarts: runs a target, >= 1.

    Raises:
        ValueError: a setting is out of range; when it runs, a task without one class an example.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020, section 5.
    """

    steps: int = 100
    targets: int = 9
    restarts: int = 1

    def __post_init__(self) -> None:
        check_counts("apgd_targeted", steps=self.steps, targets=self.targets, restarts=self.restarts)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss", "logits", "labels"})

    @property
    def passes(self) -> float:
        return float((self.steps + 1) * self.targets * self.restarts)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return apgd_targeted(
            victim, x, threat, steps=self.steps, targets=self.targets, restarts=self.restarts, generator=generator
        )
