"""Gaussian smoothing: a blur."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.attacks._checks import is_number
from robust_train.evasion.reconstruction.base import Reconstruction, check_images

WIDEST = 15  # pixels to each side


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """``(B, C, H, W)`` blurred with a Gaussian of ``sigma`` pixels, cut off at three of them; edges are repeated."""
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    images = x.flatten(0, 1)[:, None]
    across = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), kernel)
    down = F.conv2d(F.pad(across, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3))
    return down.view_as(x)


class GaussianSmoothing(Reconstruction):
    """A blur, channel by channel. It has a gradient, so that any attack sees through it.

    Args:
        sigma: width in pixels, > 0 and <= 5.

    Raises:
        ValueError: ``sigma`` is out of range; when it is called: no images.

    Reference:
        Xu et al., "Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks", 2018, section III.B.
    """

    def __init__(self, sigma: float = 0.5) -> None:
        super().__init__()
        if not is_number(sigma) or not 0 < sigma <= WIDEST / 3:
            raise ValueError(f"gaussian_smoothing.sigma must be > 0 and <= {WIDEST / 3:g}, got {sigma!r}")
        self.sigma = float(sigma)

    def forward(self, x: Tensor) -> Tensor:
        check_images("gaussian_smoothing", x)
        return gaussian_blur(x, self.sigma)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}"
