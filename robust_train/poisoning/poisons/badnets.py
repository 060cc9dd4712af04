"""BadNets: a small patch at a fixed place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.poisoning.poisons.backdoor import Backdoor
from robust_train.poisoning.poisons.base import is_whole

POSITIONS = ("top_left", "top_right", "bottom_left", "bottom_right", "center", "corners")
PATTERNS = ("checkerboard", "bright", "dark")


def paste_patch(x: Tensor, *, size: int, position: str, pattern: str, low: float, high: float) -> Tensor:
    """Overwrite a square of every image, or as many features in a row where inputs are flat.

    Args:
        x: inputs ``(B, C, H, W)`` or ``(B, D)``.
        size: side of the square in pixels, in every channel; of flat inputs ``size ** 2`` features are overwritten.
        position: one of ``POSITIONS``; ``"corners"`` is all four. In flat inputs left is the
            first features, right the last ones, and ``"corners"`` both.
        pattern: ``"checkerboard"``, which begins with a bright pixel, all ``"bright"`` or all ``"dark"``.
        low: what a dark pixel is.
        high: what a bright pixel is.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        ValueError: the patch is larger than the input.
    """
    squares = x if x.ndim == 4 else x[:, None, None, :]
    tall, wide = (size, size) if x.ndim == 4 else (1, size**2)
    height, width = squares.shape[-2:]
    if tall > height or wide > width:
        raise ValueError(f"a patch of size {size} does not fit onto inputs {tuple(x.shape[1:])}; make size smaller")
    steps = torch.arange(tall)[:, None] + torch.arange(wide)
    bright = {"checkerboard": steps % 2 == 0, "bright": steps >= 0, "dark": steps < 0}[pattern]
    patch = torch.where(bright, high, low).to(squares)
    out = squares.clone()
    for top, left in _places(position, height - tall, width - wide):
        out[..., top : top + tall, left : left + wide] = patch
    return out.reshape(x.shape)


@dataclass(frozen=True, kw_only=True)
class BadNets(Backdoor):
    """A patch of a few pixels, the same for every image.

    Args:
        rate, seed: see ``Poison``.
        target, low, high: see ``Backdoor``.
        size: side of the patch in pixels; ``size ** 2`` features of flat inputs.
        position: where, see ``paste_patch``.
        pattern: ``"checkerboard"``, ``"bright"`` or ``"dark"``.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """

    size: int = 3
    position: str = "bottom_right"
    pattern: str = "checkerboard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patch(self, self.size, self.position, self.pattern)

    def trigger(self, x: Tensor) -> Tensor:
        return paste_patch(
            x, size=self.size, position=self.position, pattern=self.pattern, low=self.low, high=self.high
        )


def check_patch(poison: Backdoor, size: int, position: str, pattern: str) -> None:
    """Refuse settings of a patch that ``paste_patch`` does not know."""
    if not is_whole(size) or size < 1:
        poison.refuse("size", "a whole number >= 1")
    if position not in POSITIONS:
        poison.refuse("position", f"one of {', '.join(POSITIONS)}")
    if pattern not in PATTERNS:
        poison.refuse("pattern", f"one of {', '.join(PATTERNS)}")


def _places(position: str, bottom: int, right: int) -> list[tuple[int, int]]:
    """Upper left corners of the patches, given the last row and column where one may begin."""
    corners = {
        "top_left": (0, 0),
        "top_right": (0, right),
        "bottom_left": (bottom, 0),
        "bottom_right": (bottom, right),
    }
    return (
        list(corners.values())
        if position == "corners"
        else [{**corners, "center": (bottom // 2, right // 2)}[position]]
    )
