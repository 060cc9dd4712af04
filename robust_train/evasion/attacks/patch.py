"""The patch attack: one square of an image, changed at will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import Threat, parse_number
from robust_train.evasion.victim import Victim, input_gradient


def patch(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    size: int = 5,
    place: Sequence[int] | None = None,
    steps: int = 50,
    step_size: float = 0.05,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Signed gradient steps on the content of one square, from random content, everything else untouched.

    Args:
        victim: the model under attack.
        x: clean images ``(B, C, H, W)``, at least ``size`` high and wide.
        threat: a box with ends; its ball plays no part.
        size: side of the square in pixels, >= 1.
        place: row and column of its upper left corner; None: drawn for each example and restart.
        steps: gradient steps a restart, >= 1.
        step_size: length of a step as a share of the range ``high - low``.
        restarts: independent runs, >= 1; of each example the one with the highest loss is kept (of the whole batch
            where the victim knows only its mean loss).
        generator: source of places and first contents; None: a fresh one with seed 0.

    Returns:
        Tensor of ``x``'s shape, in working precision. Where ``victim.stop_when_fooled``, examples leave as soon as they
        are misclassified.

    Reference:
        Brown et al., "Adversarial Patch", 2018, made for one image at a time as in Rao et al., "Adversarial Training
        against Location-Optimized Adversarial Patches", 2020, section 3.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    clean = working_precision(x)
    low, high = threat.box(clean)
    best, best_loss = clean.clone(), None
    alive = torch.arange(len(x), device=x.device)
    for _ in range(restarts):
        inside = _squares(clean, size, place, generator)[alive]
        noise = torch.rand(clean.shape, generator=generator, device=generator.device).to(clean)[alive]
        bottom, top = low[alive], high[alive]
        here = torch.where(inside, bottom + noise * (top - bottom), clean[alive])
        for _ in range(steps):
            part = victim if len(alive) == len(x) else victim.take(alive)
            grad, _, score = input_gradient(part, here.to(x.dtype))
            if score is not None and bool((score == 0).any()):
                standing = score > 0
                best[alive[~standing]] = here[~standing]
                alive, here, grad, inside = alive[standing], here[standing], grad[standing], inside[standing]
                if len(alive) == 0:
                    return best
                bottom, top = low[alive], high[alive]
            step = grad.to(clean.dtype).sign() * step_size * (top - bottom)
            here = torch.where(inside, torch.clamp(here + step, bottom, top), here)
        part = victim if len(alive) == len(x) else victim.take(alive)
        with torch.no_grad():
            loss = part.loss(here.to(x.dtype))
        if best_loss is None:
            best_loss = loss.new_full((len(x),) if loss.ndim else (), -torch.inf)
        if loss.ndim:
            better = loss > best_loss[alive]
            best[alive[better]], best_loss[alive[better]] = here[better], loss[better]
        elif loss > best_loss:
            best, best_loss = here.clone(), loss
    return best


@dataclass(frozen=True)
class Patch(Attack):
    """A square of the image, changed at will: what a sticker could do.

    It keeps to the square instead of the threat's ball; the range of the pixels holds as ever, and with ``eps = 0`` it
    is off like every attack.

    Args:
        size: side of the square in pixels, >= 1.
        place: row and column of its upper left corner, or None: drawn for each example.
        steps: gradient steps a restart, >= 1.
        step_size: length of a step as a share of the range ``high - low``, a number or a fraction, > 0.
        restarts: independent runs, >= 1, each at another place where ``place`` is None.

    Raises:
        ValueError: a setting is out of range; the threat's box has no ends; when it runs, inputs that are no images
            ``(B, C, H, W)`` or too small for the square.

    Guarantees:
        Outside of one square of each image nothing changes.

    Reference:
        Brown et al., "Adversarial Patch", 2018; Rao et al., "Adversarial Training against Location-Optimized
        Adversarial Patches", 2020.
    """

    family: ClassVar[str] = "patch"

    size: int = 5
    place: Sequence[int] | None = None
    steps: int = 50
    step_size: float | str = 0.05
    restarts: int = 1

    def __post_init__(self) -> None:
        check_counts("patch", size=self.size, steps=self.steps, restarts=self.restarts)
        length = parse_number("patch.step_size", self.step_size)
        if not 0 < length < float("inf"):
            raise ValueError(f"patch.step_size must be > 0 and finite, got {self.step_size!r}")
        object.__setattr__(self, "step_size", length)
        if self.place is not None:
            place: Any = self.place
            if (
                isinstance(place, str)
                or not isinstance(place, Sequence)
                or len(place) != 2
                or not all(map(_row, place))
            ):
                raise ValueError(f"patch.place must be [row, column] or null, got {place!r}")
            object.__setattr__(self, "place", tuple(place))

    @property
    def limits(self) -> str:
        where = "anywhere" if self.place is None else f"at row {self.place[0]}, column {self.place[1]}"
        return f"one square of {self.size} x {self.size} px, {where}"

    @property
    def passes(self) -> float:
        return float(self.steps * self.restarts)

    def check(self, threat: Threat) -> None:
        ends = torch.stack([torch.tensor(end, dtype=torch.float64).flatten()[0] for end in (threat.low, threat.high)])
        if not bool(ends.isfinite().all()):
            raise ValueError("Patch draws its content between threat.low and threat.high, which must be finite")

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        row, column = (0, 0) if self.place is None else self.place
        if x.ndim != 4 or row + self.size > x.shape[2] or column + self.size > x.shape[3]:
            raise ValueError(f"Patch needs images (B, C, H, W) that hold {self.limits}, got inputs {tuple(x.shape)}")
        return patch(
            victim,
            x,
            threat,
            size=self.size,
            place=self.place,
            steps=self.steps,
            step_size=float(self.step_size),
            restarts=self.restarts,
            generator=generator,
        )


def _row(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _squares(x: Tensor, size: int, place: Sequence[int] | None, generator: torch.Generator) -> Tensor:
    """Which pixels lie in each example's square ``(B, 1, H, W)``."""
    ends = torch.tensor([x.shape[2] - size + 1, x.shape[3] - size + 1], device=x.device)
    if place is None:
        corner = (torch.rand(len(x), 2, generator=generator, device=generator.device).to(x.device) * ends).long()
    else:
        corner = torch.tensor(list(place), device=x.device).expand(len(x), 2)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
    in_rows = (rows >= corner[:, :1]) & (rows < corner[:, :1] + size)
    in_columns = (columns >= corner[:, 1:]) & (columns < corner[:, 1:] + size)
    return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
