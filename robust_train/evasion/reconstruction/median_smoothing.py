"""Median smoothing: each pixel becomes the median of its neighbours."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.reconstruction.base import Reconstruction, check_images


def median_filter(x: Tensor, size: int) -> Tensor:
    """The median of the ``size`` by ``size`` window around each pixel of ``(B, C, H, W)``; edges are repeated.

    Of an even number of pixels the lower of the two in the middle.
    """
    before, after = (size - 1) // 2, size // 2
    padded = F.pad(x, (before, after, before, after), mode="replicate")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(4).values


class MedianSmoothing(Reconstruction):
    """A median filter, channel by channel.

    Args:
        size: of the window, 2 to 15.

    Raises:
        ValueError: ``size`` is out of range; when it is called: no images.

    Reference:
        Xu et al., "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2018, section III.B.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        check_counts("median_smoothing", size=size)
        if not 2 <= size <= 15:
            raise ValueError(f"median_smoothing.size must be from 2 to 15, got {size}")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        check_images("median_smoothing", x)
        return median_filter(x, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"
