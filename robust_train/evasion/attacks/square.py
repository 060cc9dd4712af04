"""The Square attack: random search with square-shaped changes, from class scores alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.margins import class_scores, margin
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim, correctness

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


def square(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change one window of the perturbation at a time, and keep what lowers the margin.

    Args:
        victim: the model under attack; it needs logits ``(B, classes)`` and labels, and is never differentiated.
        x: clean inputs; windows run over the last two dimensions of ``(B, C, H, W)``, or over the one of ``(B, D)``.
        threat: ball and box. In Linf the perturbation of a window becomes ``+eps`` or ``-eps`` a channel; in L2 and L1
            a bump there takes the budget of another window over.
        queries: times that the model is asked about an example, >= 1.
        p_init: share of the input that the first windows cover, in (0, 1].
        rescale_schedule: shrink windows by the share of ``queries`` that is spent instead of by their number.
        generator: source of the windows; None: a fresh one with seed 0. The examples of a batch share each draw.

    Returns:
        Tensor of ``x``'s shape, in working precision: of each example the point with the largest margin of a wrong
        class. Examples leave once they are misclassified.

    Guarantees:
        What is found for an example depends neither on its place in the batch nor on the other examples, up to the
        rounding of the model; no gradient is taken.

    Reference:
        Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", 2020,
        algorithms 1 to 3; for L1 Croce & Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks", 2021, appendix.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    clean = working_precision(x)
    found = clean.clone()
    shape = _image_shape(x)
    channels, height, width = shape
    draws = torch.rand(queries, 5, generator=generator, device=generator.device).tolist()
    signs = torch.randint(0, 2, (queries, channels, 1, 1), generator=generator, device=generator.device)
    signs = (signs * 2 - 1).to(clean)
    alive = torch.arange(len(x), device=x.device)
    part, origin, limits = victim, clean, threat.limits(clean)
    delta = _first_perturbation(shape, threat, signs.dtype, generator).to(x.device)
    here = _moved(delta.expand(len(x), *shape), origin, threat, limits)
    best, best_margin = here, torch.full((len(x),), -torch.inf, device=x.device)
    for i in range(queries):
        if i > 0:
            side = _side(i - 1, height * width, p_init, queries if rescale_schedule else None)
            here = _propose(best, origin, threat, limits, shape, side, draws[i], signs[i])
        with torch.no_grad():
            logits = part.logits(here.to(x.dtype))
            scores, truth = class_scores(logits, part.known_labels())
            now, right = margin(scores, truth).float(), correctness(logits, part.known_labels()) > 0
        better = (now > best_margin) | ~right
        best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), here, best)
        best_margin = torch.where(better, now, best_margin)
        if not bool(right.all()):
            found[alive[~right]] = best[~right]
            alive, origin, best, best_margin = alive[right], origin[right], best[right], best_margin[right]
            if len(alive) == 0:
                return found
            part, limits = victim.take(alive), (limits[0][right], limits[1][right])
    found[alive] = best
    return found


def _image_shape(x: Tensor) -> tuple[int, int, int]:
    """Channels, height and width: a vector is one row, further dimensions are laid side by side."""
    if x.ndim <= 2:
        return 1, 1, max(1, x[0].numel())
    if x.ndim == 3:
        return x.shape[1], 1, x.shape[2]
    return x.shape[1], x.shape[2], x[0, 0, 0].numel()


def _side(iteration: int, area: int, p_init: float, queries: int | None) -> int:
    """Side of the window, in features; the covered share is halved as the search goes on."""
    now = iteration if queries is None else int(iteration / queries * 10000)
    share = p_init / 2 ** sum(now > bound for bound in HALVINGS)
    return max(round(math.sqrt(share * area)), 1)


def _window(side: int, height: int, width: int, u: float, v: float) -> tuple[slice, slice]:
    """A window of about ``side * side`` features at a uniform place; longer where the input is not so high."""
    rows = min(side, height)
    columns = min(side if rows == side else max(1, side * side // rows), width)
    top, left = int(u * (height - rows + 1)), int(v * (width - columns + 1))
    return slice(top, top + rows), slice(left, left + columns)


def _propose(
    best: Tensor,
    origin: Tensor,
    threat: Threat,
    limits: tuple[Tensor, Tensor],
    shape: tuple[int, int, int],
    side: int,
    u: list[float],
    sign: Tensor,
) -> Tensor:
    """The next candidates ``(B, ...)``, from uniform numbers ``u`` and signs ``(channels, 1, 1)``."""
    channels, height, width = shape
    if threat.norm == "linf":  # the ball's corners are its limits
        rows, columns = _window(side, height, width, u[0], u[1])
        low, high = (limit.view(-1, *shape)[:, :, rows, columns] for limit in limits)
        new = best.view(-1, *shape).clone()
        new[:, :, rows, columns] = torch.where(sign > 0, high, low)
        return new.view(best.shape)
    delta = ((best - origin) * threat.scale(origin)).view(-1, *shape)
    side = max(side, 3) | 1  # odd
    here, there = _window(side, height, width, u[0], u[1]), _window(side, height, width, u[2], u[3])
    power = 2 if threat.norm == "l2" else 1
    inside = torch.zeros((height, width), dtype=delta.dtype, device=delta.device)
    inside[here] = 1.0
    inside[there] = 1.0
    windows = _size(delta * inside, power, (2, 3))  # what both windows together hold, channel by channel
    spare = (threat.radius**power - _size(delta, power, (1, 2, 3)) ** power).clamp_min(0.0)
    budget = (spare / channels + windows**power) ** (1 / power)
    old = delta[:, :, here[0], here[1]]
    bump = _bump(old.shape[2], old.shape[3], power, u[4] < 0.5).to(delta)
    new = sign * bump + old / _size(old, power, (2, 3)).clamp_min(1e-12)
    new = new / _size(new, power, (2, 3)).clamp_min(1e-12) * budget
    delta = delta.clone()
    delta[:, :, there[0], there[1]] = 0.0
    delta[:, :, here[0], here[1]] = new if power == 2 else new * channels
    if power == 2:
        delta = delta / _size(delta, power, (1, 2, 3)).clamp_min(1e-12) * threat.radius
    return _moved(delta, origin, threat, limits)


def _moved(delta: Tensor, origin: Tensor, threat: Threat, limits: tuple[Tensor, Tensor]) -> Tensor:
    """Clean inputs plus perturbations ``(B, C, H, W)`` in pixels, inside ball and box."""
    return threat.project(origin + delta.reshape(origin.shape) / threat.scale(origin), origin, limits)


def _first_perturbation(
    shape: tuple[int, int, int], threat: Threat, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Vertical stripes in Linf, a grid of bumps otherwise; ``(C, H, W)`` in pixels."""
    channels, height, width = shape
    device = generator.device
    if threat.norm == "linf":
        stripes = torch.randint(0, 2, (channels, 1, width), generator=generator, device=device).to(dtype) * 2 - 1
        return (stripes * threat.radius).expand(shape).contiguous()
    power = 2 if threat.norm == "l2" else 1
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    signs = torch.randint(0, 2, (down, across, channels, 1, 1), generator=generator, device=device).to(dtype) * 2 - 1
    turned = torch.randint(0, 2, (down, across), generator=generator, device=device).tolist()
    delta = torch.zeros(shape, dtype=dtype, device=device)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    for i in range(down):
        for j in range(across):
            rows, columns = slice(top + i * side, top + (i + 1) * side), slice(left + j * side, left + (j + 1) * side)
            delta[:, rows, columns] = signs[i, j] * _bump(side, side, power, bool(turned[i][j])).to(delta)
    length = delta.abs().pow(power).sum() ** (1 / power)
    return delta / length * threat.radius


def _bump(rows: int, columns: int, power: int, turned: bool) -> Tensor:
    """A hill beside a valley ``(rows, columns)``, of norm 1 in L2 (``power=2``) or L1 (``power=1``)."""
    if (turned and columns > 1) or rows == 1:
        return _bump_upright(columns, rows, power).T
    return _bump_upright(rows, columns, power)


@lru_cache(maxsize=128)
def _bump_upright(rows: int, columns: int, power: int) -> Tensor:
    parts = [_hill(part, columns, 4 // power) for part in (rows // 2, rows - rows // 2) if part > 0]
    parts = [part / part.abs().pow(power).sum() ** (1 / power) for part in parts]
    bump = torch.cat([parts[0], -parts[1]] if len(parts) == 2 else [-parts[0]])
    return bump / bump.abs().pow(power).sum() ** (1 / power)


def _hill(rows: int, columns: int, decay: int) -> Tensor:
    """Squares around the middle on top of one another, the k-th of height ``k ** -decay``."""
    middle = rows // 2, columns // 2
    tails = torch.arange(1, max(middle) + 2, dtype=torch.float64).pow(-decay).flip(0).cumsum(0).flip(0)
    down, across = (torch.arange(rows) - middle[0]).abs(), (torch.arange(columns) - middle[1]).abs()
    return tails[torch.maximum(down[:, None], across[None, :])]


def _size(delta: Tensor, power: int, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(delta, ord=power, dim=dims, keepdim=True)


@dataclass(frozen=True)
class Square(Attack):
    """The Square attack; it asks for class scores only, so that masked gradients do not protect from it.

    Args:
        queries: times that the model is asked about an example, >= 1.
        p_init: share of the input that the first windows cover, in (0, 1].
        rescale_schedule: shrink windows by the share of ``queries`` that is spent instead of by their number.

    Raises:
        ValueError: a setting is out of range; when it runs, a task without one class an example.

    Reference:
        Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search", 2020.
    """

    family: ClassVar[str] = "blackbox"

    queries: int = 5000
    p_init: float = 0.8
    rescale_schedule: bool = False

    def __post_init__(self) -> None:
        check_counts("square", queries=self.queries)
        if not is_number(self.p_init) or not 0 < self.p_init <= 1:
            raise ValueError(f"square.p_init must be in (0, 1], got {self.p_init!r}")
        if not isinstance(self.rescale_schedule, bool):
            raise ValueError(f"square.rescale_schedule must be true or false, got {self.rescale_schedule!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "labels"})

    @property
    def passes(self) -> float:
        return self.queries / 2  # a forward pass is about half of a forward-backward pass

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return square(
            victim,
            x,
            threat,
            queries=self.queries,
            p_init=self.p_init,
            rescale_schedule=self.rescale_schedule,
            generator=generator,
        )
