"""Uniform random noise: the floor that every attack must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import NORMS, Threat
from robust_train.evasion.victim import Victim


def uniform_noise(victim: Victim, x: Tensor, threat: Threat, *, draws: int, generator: torch.Generator) -> Tensor:
    """The worst of ``draws`` uniform points of the ball.

    Args:
        victim: the model under attack; asked only where ``draws > 1``.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        draws: points tried, >= 1.
        generator: source of the noise.

    Returns:
        Of each example the point with the highest loss (of the batch where only its mean is known), ``(B, ...)``.
    """
    clean = working_precision(x)
    best = threat.random_start(clean, generator)
    if draws == 1:
        return best
    with torch.no_grad():
        best_loss = victim.loss(best.to(x.dtype))
        for _ in range(draws - 1):
            here = threat.random_start(clean, generator)
            loss = victim.loss(here.to(x.dtype))
            better = loss > best_loss
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), here, best)
            best_loss = torch.maximum(loss, best_loss)
    return best


@dataclass(frozen=True)
class UniformNoise(Attack):
    """Random noise in the threat's ball; no gradients.

    Args:
        draws: points tried, >= 1; the worst is kept.

    Raises:
        ValueError: ``draws`` is not a whole number >= 1.
    """

    family: ClassVar[str] = "noise"
    works_in: ClassVar[tuple[str, ...]] = NORMS

    draws: int = 1

    def __post_init__(self) -> None:
        check_counts("uniform_noise", draws=self.draws)

    @property
    def passes(self) -> float:
        return 0.0 if self.draws == 1 else self.draws / 2  # a forward pass is about half of a forward-backward pass

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return uniform_noise(victim, x, threat, draws=self.draws, generator=generator)
