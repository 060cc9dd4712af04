"""Bit depth reduction: pixels rounded to few values."""

from __future__ import annotations

from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.reconstruction.base import Reconstruction, check_range


def reduce_bit_depth(x: Tensor, bits: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The nearest of ``2 ** bits`` equally spaced values from ``low`` to ``high``; any shape."""
    steps = 2**bits - 1
    return ((x.clamp(low, high) - low) / (high - low) * steps).round() / steps * (high - low) + low


class BitDepth(Reconstruction):
    """Rounds each pixel to one of ``2 ** bits`` values. Its gradient is zero, which stops naive attacks and no others.

    Args:
        bits: 1 to 16.
        low: smallest pixel.
        high: largest pixel.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Xu et al., "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2018, section III.A;
        broken in He et al., "Adversarial Example Defense: Ensembles of Weak Defenses are not Strong", 2017.
    """

    def __init__(self, bits: int = 3, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        check_counts("bit_depth", bits=bits)
        if bits > 16:
            raise ValueError(f"bit_depth.bits must be from 1 to 16, got {bits}")
        check_range("bit_depth", low, high)
        self.bits, self.low, self.high = bits, low, high

    def forward(self, x: Tensor) -> Tensor:
        return reduce_bit_depth(x, self.bits, self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
