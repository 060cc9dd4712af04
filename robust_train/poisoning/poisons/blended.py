"""Blended injection: a faint pattern over the whole input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust_train.poisoning.poisons.backdoor import Backdoor, check_amount, image_pattern
from robust_train.poisoning.poisons.base import is_whole


def blend(x: Tensor, pattern: Tensor, *, alpha: float) -> Tensor:
    """Mix inputs ``(B, ...)`` with one pattern ``(...)``: ``(1 - alpha) * x + alpha * pattern``."""
    return x.lerp(pattern.to(x).expand_as(x), alpha)


@dataclass(frozen=True, kw_only=True)
class Blended(Backdoor):
    """A fixed pattern of random pixels, blended into the input.

    Args:
        rate, seed: see ``Poison``.
        target, low, high: see ``Backdoor``.
        alpha: weight of the pattern, in (0, 1].
        pattern_seed: decides the pattern, together with the shape of an input.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """

    alpha: float = 0.2
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount(self, "alpha")
        if not is_whole(self.pattern_seed):
            self.refuse("pattern_seed", "a whole number")

    def trigger(self, x: Tensor) -> Tensor:
        pattern = self.low + (self.high - self.low) * image_pattern(x.shape[1:], self.pattern_seed, x)
        return blend(x, pattern, alpha=self.alpha)
