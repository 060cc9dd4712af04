"""Rounded probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust_train.privacy.output.base import OutputPerturbation


def rounded(probabilities: Tensor, decimals: int) -> Tensor:
    """Probabilities with few decimals, made to sum to 1 again.

    Args:
        probabilities: ``(B, classes)``.
        decimals: how many, >= 0.

    Returns:
        Tensor of the same shape. Where every probability rounds to 0, all classes are equally likely.
    """
    rough = probabilities.round(decimals=decimals)
    total = rough.sum(1, keepdim=True)
    return (rough / total.clamp_min(10.0**-decimals)).where(total > 0, 1.0 / probabilities.shape[1])


@dataclass(frozen=True)
class Rounding(OutputPerturbation):
    """Round probabilities to a number of decimals.

    Args:
        decimals: whole number from 0 to 15.

    Raises:
        ValueError: it is something else.

    Reference:
        Shokri et al., "Membership Inference Attacks Against Machine Learning Models", 2017, section VIII.
    """

    decimals: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.decimals, bool) or not isinstance(self.decimals, int) or not 0 <= self.decimals <= 15:
            raise ValueError(f"rounding.decimals must be a whole number from 0 to 15, got {self.decimals!r}")

    def __call__(self, probabilities: Tensor) -> Tensor:
        return rounded(probabilities, self.decimals)
