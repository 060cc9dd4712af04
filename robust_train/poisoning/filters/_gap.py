"""How isolated a part of some points is: directions that tell it from the rest, and the gap along them."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 5  # points of a side that a direction can be fitted to
SHRINKAGE = 0.05  # weight of a round covariance in that within the sides
ROUNDS = 6  # of direction and split, at most
EM_STEPS = 50
EM_LEAST = 3.0  # points that a component of a mixture may shrink to
EM_SETTLED = 1e-4  # change of a membership
MOST_APART = 100.0  # separation of sides that hardly vary
TINY = 1e-30


def discriminants(points: Tensor, sides: Tensor, used: Tensor | None = None) -> Tensor:
    """Fisher's linear discriminant, with a shrunken covariance, of each of several splits of the same points.

    Args:
        points: ``(n, k)``.
        sides: bool ``(c, n)``, True on one side of each split; neither side may be empty among the ``used``.
        used: bool ``(c, n)``, the points that count; None: all.

    Returns:
        ``(c, k)``, of no particular length; the mean of a side projects higher than that of the rest.

    Reference:
        Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936; Friedman, "Regularized Discriminant
        Analysis", 1989, section 3 (shrinkage).
    """
    counted = torch.ones_like(sides) if used is None else used
    ones, rest, weights = (part.to(points) for part in (sides & counted, ~sides & counted, counted))
    n, m = ones.sum(1, keepdim=True), rest.sum(1, keepdim=True)
    apart = ones @ points / n - rest @ points / m
    mean = weights @ points / (n + m)
    if used is None:  # the same second moment for every split
        second = (points.T @ points).expand(len(sides), -1, -1)
    else:
        second = points.new_empty(len(sides), points.shape[1], points.shape[1])
        for i, weight in enumerate(weights):
            second[i] = (points.T * weight) @ points
    total = second / (n + m)[..., None] - mean[:, :, None] * mean[:, None]
    trace = total.diagonal(dim1=1, dim2=2).sum(1)
    within = trace - (n * m / (n + m).square())[:, 0] * apart.square().sum(1)
    evenly = SHRINKAGE * within.clamp_min(1e-9 * trace) / points.shape[1] + TINY
    # The covariance within the sides is the total one less a multiple of apart * apart', which changes the length of
    # the solution and not its direction.
    mixed = (1 - SHRINKAGE) * total + evenly[:, None, None] * torch.eye(points.shape[1]).to(points)
    return torch.linalg.solve(mixed, apart)


def split_by_two_normals(line: Tensor, sides: Tensor) -> Tensor:
    """Split numbers in two by a mixture of two normal distributions of any widths, fitted by expectation maximisation.

    Args:
        line: several sets of n numbers ``(c, n)``.
        sides: bool ``(c, n)``, where each fit starts; neither side may be empty.

    Returns:
        bool ``(c, n)``: what rather belongs to the distribution that started as the side. A fit stops before one of the
        two would be left with fewer than ``EM_LEAST`` numbers.

    Reference:
        Dempster et al., "Maximum Likelihood from Incomplete Data via the EM Algorithm", 1977, section 4.3.
    """
    memberships = sides.to(line)
    floor = 1e-5 * line.var(1, correction=0, keepdim=True) + TINY
    going = torch.arange(len(line))
    for _ in range(EM_STEPS):
        x, old = line[going], memberships[going]
        logs = []
        for weight in (old, 1 - old):
            size = weight.sum(1, keepdim=True)
            mean = (x * weight).sum(1, keepdim=True) / size
            squares = (x - mean).square()
            variance = (squares * weight).sum(1, keepdim=True) / size + floor[going]
            logs.append(size.log() - variance.log() / 2 - squares / (2 * variance))
        new = (logs[0] - logs[1]).sigmoid()
        left = torch.minimum(new.sum(1), (1 - new).sum(1)) >= EM_LEAST
        memberships[going[left]] = new[left]
        going = going[left & ((new - old).abs().amax(1) >= EM_SETTLED)]
        if len(going) == 0:
            break
    return memberships > 0.5


def refined(points: Tensor, sides: Tensor) -> Tensor:
    """Alternate between the direction that tells two sides apart and the split along it, until both stay.

    Args:
        points: ``(n, k)``.
        sides: bool ``(c, n)``, where to start from.

    Returns:
        bool ``(<= c, n)``: the smaller side of each split that kept at least ``LEAST`` points on either side.

    Reference:
        Ding and Li, "Adaptive Dimension Reduction Using Discriminant Analysis and K-means Clustering", 2007, section 3;
        there with k-means in place of the two normal distributions.
    """
    sides = sides.clone()
    going = _both_filled(sides).nonzero()[:, 0]
    for _ in range(ROUNDS):
        if len(going) == 0:
            break
        old = sides[going]
        sides[going] = new = split_by_two_normals(discriminants(points, old) @ points.T, old)
        going = going[_both_filled(new) & (new != old).any(1)]
    sides = sides[_both_filled(sides)]
    return torch.where(2 * sides.sum(1, keepdim=True) > len(points), ~sides, sides)


def _both_filled(sides: Tensor) -> Tensor:
    return torch.minimum(sides.sum(1), (~sides).sum(1)) >= LEAST


def cuts(points: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """The direction that tells each side from the rest, and the place midway between the medians of the two.

    Args:
        points: ``(n, k)``.
        sides: bool ``(c, n)``; neither a side nor the rest may be empty.

    Returns:
        Directions ``(c, k)``, and thresholds ``(c,)`` of projections onto them, above which the side lies.
    """
    directions = discriminants(points, sides)
    line = directions @ points.T
    return directions, ((_median(line, sides) + _median(line, ~sides)) / 2)[:, 0]


def gaps(points: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """How far each side lies from the rest, and how empty the space between is, along directions fitted to others.

    The points of each side, and those of the rest, are dealt to two folds in turn. The points of one are measured along
    the discriminant of the other, on which the median of the rest is 0 and that of the side 1.

    Args:
        points: ``(n, k)``, in an order that says nothing of how they lie to one another.
        sides: bool ``(c, n)``; each side, and the rest, with at least two points.

    Returns:
        Separations ``(c,)``: distance of the two medians in units of the root mean square of the two standard
        deviations, at most ``MOST_APART``; <= 0 where one fold contradicts the other. And valley shares ``(c,)``: how
        many points lie in the middle third between the medians, for each point of the side.

    Reference:
        Ashman et al., "Detecting Bimodality in Astronomical Datasets", 1994, section 4 (D, there with means).
    """
    dealt = torch.where(sides, sides.cumsum(1), (~sides).cumsum(1)) % 2 == 0
    place = torch.zeros(sides.shape).to(points)
    for held in (dealt, ~dealt):
        line = discriminants(points, sides, ~held) @ points.T
        low, high = _median(line, ~sides & ~held), _median(line, sides & ~held)
        place = torch.where(held, (line - low) / (high - low).clamp_min(TINY), place)
    low, high = _median(place, ~sides), _median(place, sides)
    width = ((_variance(place, sides) + _variance(place, ~sides)) / 2).sqrt()
    apart = ((high - low) / width.clamp_min(TINY))[:, 0].clamp_max(MOST_APART)
    third = (high - low) / 3
    between = ((place > low + third) & (place < high - third)).sum(1)
    return apart, between / sides.sum(1)


def _median(line: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, line, torch.nan).nanmedian(1, keepdim=True).values


def _variance(line: Tensor, where: Tensor) -> Tensor:
    weight = where.to(line)
    size = weight.sum(1, keepdim=True)
    mean = (line * weight).sum(1, keepdim=True) / size
    return ((line - mean).square() * weight).sum(1, keepdim=True) / size
