"""WaNet: the image is warped a little, always in the same way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robust_train.poisoning.poisons.backdoor import DecoyBackdoor
from robust_train.poisoning.poisons.base import is_number, is_whole


def warping_field(height: int, width: int, *, k: int, s: float, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of every pixel.

    Args:
        height: of the image.
        width: of the image.
        k: control points a side; between them the field is interpolated.
        s: mean displacement of a control point along an axis, in pixels.
        generator: draws the control points.

    Returns:
        Displacements ``(height, width, 2)`` along x and y, in pixels, float32.
    """
    control = 2 * torch.rand(1, 2, k, k, generator=generator) - 1
    control = s * control / control.abs().mean()
    return F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)


def warp(x: Tensor, field: Tensor) -> Tensor:
    """Move the pixels of images ``(B, C, H, W)`` by ``field (H, W, 2)`` or ``(B, H, W, 2)``, in pixels.

    Pixels between others are interpolated linearly; what would lie outside is taken from the border.
    """
    batch, _, height, width = x.shape
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    pixel = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])  # in the units of grid_sample
    grid = torch.stack([columns, rows], -1).to(x) + field.to(x) * pixel.to(x)
    return F.grid_sample(x, grid.expand(batch, -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=True)


@dataclass(frozen=True, kw_only=True)
class WaNet(DecoyBackdoor):
    """A smooth elastic warp that a viewer hardly sees; for images.

    Args:
        rate, seed: see ``Poison``.
        target, low, high: see ``Backdoor``.
        cross: see ``DecoyBackdoor``; decoys are warped by the field plus noise of its own for every image.
        k: control points a side, >= 2.
        s: mean displacement of a control point along an axis, in pixels; the authors' 0.5 is 0.25 here.
        pattern_seed: decides the field, together with the size of an image.

    Raises:
        ValueError: a setting is out of range; inputs are not images.

    Reference:
        Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", 2021.
    """

    k: int = 4
    s: float = 0.5
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.k) or self.k < 2:
            self.refuse("k", "a whole number >= 2")
        if not is_number(self.s) or not 0 < self.s < float("inf"):
            self.refuse("s", "a number > 0")
        if not is_whole(self.pattern_seed):
            self.refuse("pattern_seed", "a whole number")

    def field(self, x: Tensor) -> Tensor:
        """The displacement ``(H, W, 2)`` of every pixel of images like ``x``, in pixels."""
        if x.ndim != 4:
            raise ValueError(
                f"wanet warps images (N, C, H, W), and inputs are {tuple(x.shape)}; choose another trigger"
            )
        generator = torch.Generator().manual_seed(self.pattern_seed)
        return warping_field(*x.shape[-2:], k=self.k, s=self.s, generator=generator)

    def trigger(self, x: Tensor) -> Tensor:
        return warp(x, self.field(x))

    def decoy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        noise = 2 * torch.rand(len(x), *x.shape[-2:], 2, generator=generator) - 1
        return warp(x, self.field(x) + noise / 2)  # up to half a pixel, as in the authors' code
