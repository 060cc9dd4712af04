"""Adversarial logit pairing: the logits of clean and adversarial inputs are drawn together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.victim import Victim


def logit_distance(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Mean squared difference of each example's logits, ``(B,)``.

    Args:
        logits: of clean inputs ``(B, ...)``.
        logits_adv: of adversarial inputs, same shape.
    """
    return (logits.float() - logits_adv.float()).square().reshape(len(logits), -1).mean(1)


@dataclass(frozen=True)
class ALP(Objective):
    """``(1 - clean_weight) * own(x_adv) + clean_weight * own(x) + weight * mean squared difference of the logits``.

    Judge it with strong attacks, many steps and restarts: Engstrom et al., "Evaluating and Understanding the Robustness
    of Adversarial Logit Pairing", 2018, broke the published model, whose flat loss had slowed weaker attacks.

    Args:
        weight: weight of the pairing, >= 0.
        clean_weight: share of the clean loss, in [0, 1); 0.5 is the paper's mixed batch of both.

    Raises:
        ValueError: a setting is out of range.

    Guarantees:
        With ``eps = 0`` the gradient equals the user's own up to float rounding.

    Reference:
        Kannan et al., "Adversarial Logit Pairing", 2018, section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    uses_logits: ClassVar[bool] = True

    weight: float = 0.5
    clean_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, end in (("weight", float("inf")), ("clean_weight", 1.0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < end:
                raise ValueError(f"alp.{name} must be in [0, {end:g}), got {value!r}")

    @property
    def own_weight(self) -> float:
        return 1.0 - self.clean_weight

    @property
    def extra_passes(self) -> float:
        return 2.0 if self.clean_weight else 1.0

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        if logits is None:
            raise ValueError("ALP needs the logits of the training step")
        if not self.clean_weight:
            return self.weight * logit_distance(victim.logits(x), logits).mean()
        loss, clean = victim.loss_and_logits(x)
        return self.clean_weight * loss.mean() + self.weight * logit_distance(clean, logits).mean()
