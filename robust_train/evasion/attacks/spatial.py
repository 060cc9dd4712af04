"""The spatial attack: rotate and shift an image, the worst of many ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim


def moved(x: Tensor, degrees: Tensor, shift: Tensor, threat: Threat) -> Tensor:
    """Images rotated about their middle and then shifted, by bilinear interpolation.

    Args:
        x: images ``(B, C, H, W)``.
        degrees: angle of each, counter-clockwise, ``(B,)``.
        shift: of each, in pixels to the right and downwards, ``(B, 2)``.
        threat: its ``low`` fills what comes in from outside, as black does in the paper.

    Returns:
        Tensor of ``x``'s shape.
    """
    height, width = x.shape[2:]
    angle = torch.deg2rad(degrees.to(x))
    cos, sin, (right, down) = angle.cos(), angle.sin(), shift.to(x).unbind(1)
    # from a place in the result to its place in x, both from -1 to 1: undo the shift, then the rotation
    back = torch.stack([torch.stack([cos, -sin * height / width], 1), torch.stack([sin * width / height, cos], 1)], 1)
    offset = back @ torch.stack([-2 * right / width, -2 * down / height], 1).unsqueeze(2)
    grid = F.affine_grid(torch.cat([back, offset], 2), list(x.shape), align_corners=False)
    fill = threat.from_pixels(torch.zeros_like(x) + _per_channel(threat.low, x))
    return F.grid_sample(x - fill, grid, align_corners=False) + fill


def spatial(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    rotation: float = 30.0,
    translation: float = 3.0,
    tries: int = 10,
    grid: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Try rotations and shifts, and keep what hurts most.

    Args:
        victim: the model under attack; it is never differentiated.
        x: clean images ``(B, C, H, W)``.
        threat: box; its ball plays no part.
        rotation: largest angle in degrees, to either side.
        translation: largest shift in pixels, along each axis and to either side.
        tries: random ways for each example, >= 1.
        grid: try a grid instead: how many angles, and how many shifts along each axis, evenly spaced.
        generator: source of the random ways; None: a fresh one with seed 0.

    Returns:
        Of each example the candidate with the highest loss, the clean input among them (of the whole batch where the
        victim knows only its mean loss); where ``victim.stop_when_fooled``, the first that is misclassified.

    Reference:
        Engstrom et al., "Exploring the Landscape of Spatial Robustness", 2019, section 3.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    best = clean = working_precision(x)
    ways = _grid(grid, rotation, translation, clean) if grid is not None else None
    with torch.no_grad():
        best_loss = victim.loss(x)
        alive = torch.arange(len(x), device=x.device)
        for i in range(tries if ways is None else len(ways)):
            if ways is None:
                u = torch.rand(len(x), 3, generator=generator, device=generator.device).to(clean) * 2 - 1
                way = u[alive] * u.new_tensor([rotation, translation, translation])
            else:
                way = ways[i].expand(len(alive), 3)
            part = victim if len(alive) == len(x) else victim.take(alive)
            here = moved(clean[alive], way[:, 0], way[:, 1:], threat)
            loss = part.loss(here.to(x.dtype))
            better = loss > (best_loss[alive] if loss.ndim else best_loss)
            worse = torch.where(better.view(-1, *[1] * (x.ndim - 1)), here, best[alive])
            best = best.index_copy(0, alive, worse)
            top = torch.maximum(loss, best_loss[alive] if loss.ndim else best_loss)
            best_loss = best_loss.index_copy(0, alive, top) if loss.ndim else top
            if victim.stop_when_fooled:
                fooled = part.score(here.to(x.dtype)) == 0
                best[alive[fooled]] = here[fooled]
                alive = alive[~fooled]
                if len(alive) == 0:
                    break
    return best


@dataclass(frozen=True)
class Spatial(Attack):
    """Rotation and translation: small ones fool many models, and none of them is near in a norm.

    It keeps to limits of its own instead of the threat's ball; the range of the pixels holds as ever, and with
    ``eps = 0`` it is off like every attack.

    Args:
        rotation: largest angle in degrees, in [0, 180].
        translation: largest shift in pixels along each axis, >= 0.
        tries: random ways for each example, >= 1; the paper's "worst of 10".
        grid: try a grid instead: how many angles, and how many shifts along each axis; the paper's is [31, 5].

    Raises:
        ValueError: a setting is out of range; the threat has no lowest pixel value; when it runs, inputs that are no
            images ``(B, C, H, W)``.

    Reference:
        Engstrom et al., "Exploring the Landscape of Spatial Robustness", 2019, section 3.
    """

    family: ClassVar[str] = "spatial"

    rotation: float = 30.0
    translation: float = 3.0
    tries: int = 10
    grid: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, most in (("rotation", 180.0), ("translation", math.inf)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= most:
                raise ValueError(f"spatial.{name} must be a number >= 0{' and <= 180' * (most == 180)}, got {value!r}")
        if self.rotation == self.translation == 0:
            raise ValueError("spatial.rotation and spatial.translation are both 0, so that nothing would be tried")
        check_counts("spatial", tries=self.tries)
        if self.grid is not None:
            if not isinstance(self.grid, Sequence) or isinstance(self.grid, str) or len(self.grid) != 2:
                raise ValueError(f"spatial.grid must be [angles, shifts] or null, got {self.grid!r}")
            check_counts("spatial", **{f"grid[{i}]": size for i, size in enumerate(self.grid)})
            object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def limits(self) -> str:
        return f"rotation up to {self.rotation:g}°, translation up to {self.translation:g} px"

    @property
    def passes(self) -> float:
        ways = self.tries if self.grid is None else self.grid[0] * self.grid[1] ** 2
        return (1 + ways) / 2  # a forward pass is about half of a forward-backward pass

    def check(self, threat: Threat) -> None:
        if not bool(torch.tensor(threat.low).isfinite().all()):
            raise ValueError(f"Spatial fills in the lowest pixel value, but threat.low is {threat.low}: give a number")

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"Spatial moves images (B, C, H, W), got inputs {tuple(x.shape)}")
        return spatial(
            victim,
            x,
            threat,
            rotation=float(self.rotation),
            translation=float(self.translation),
            tries=self.tries,
            grid=self.grid,
            generator=generator,
        )


def _per_channel(value: float | str | tuple[float, ...], x: Tensor) -> Tensor:
    out = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return out.view(1, -1, 1, 1) if out.ndim else out


def _grid(grid: Sequence[int], rotation: float, translation: float, x: Tensor) -> Tensor:
    """All ways of a grid ``(ways, 3)``: degrees, shift to the right, shift downwards."""
    angles = torch.linspace(-rotation, rotation, grid[0]) if grid[0] > 1 else torch.zeros(1)
    shifts = torch.linspace(-translation, translation, grid[1]) if grid[1] > 1 else torch.zeros(1)
    return torch.cartesian_prod(angles, shifts, shifts).to(x)
