"""Adversarial training on the worst case: the adversarial batch takes the clean one's place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.victim import Victim


@dataclass(frozen=True)
class PGDAT(Objective):
    """The user's own loss on adversarial inputs, or a mix: ``(1 - clean_weight) * adversarial + clean_weight * clean``.

    Args:
        clean_weight: share of the clean loss, in [0, 1).

    Raises:
        ValueError: ``clean_weight`` is out of range.

    Guarantees:
        With ``eps = 0`` and ``clean_weight = 0`` training is bit-identical to training without it.

    Reference:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1; the mix:
        Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, section 6.
    """

    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        number = isinstance(self.clean_weight, (int, float)) and not isinstance(self.clean_weight, bool)
        if not number or not 0 <= self.clean_weight < 1:
            raise ValueError(f"pgd_at.clean_weight must be in [0, 1), got {self.clean_weight!r}")

    @property
    def own_weight(self) -> float:
        return 1.0 - self.clean_weight

    @property
    def extra_passes(self) -> float:
        return 1.0 if self.clean_weight else 0.0

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        return self.clean_weight * victim.loss(x).mean() if self.clean_weight else None
