"""HopSkipJump: a decision-based attack, which sees nothing of the model but whether it was right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim

NORMS = ("linf", "l2")
ROWS = 256  # inputs in one forward pass, where there are more random points than that
STARTS = 20  # points tried before an example is given up


class _Oracle:
    """Answers which inputs are misclassified, and counts the questions."""

    def __init__(self, victim: Victim, threat: Threat, dtype: torch.dtype, queries: int) -> None:
        self.victim, self.left = victim, queries
        self._threat, self._dtype = threat, dtype

    def wrong(self, pixels: Tensor) -> Tensor:
        """Of ``(B, ...)``, bool ``(B,)``: one question an example."""
        self.left -= 1
        return self.victim.score(self._threat.from_pixels(pixels).to(self._dtype)) == 0

    def wrong_each(self, pixels: Tensor) -> Tensor:
        """Of ``(K, B, ...)``, bool ``(K, B)``: K questions an example."""
        draws, size = pixels.shape[:2]
        self.left -= draws
        part = self.victim.take(torch.arange(size, device=pixels.device).repeat(draws))
        return (part.score(self._threat.from_pixels(pixels.flatten(0, 1)).to(self._dtype)) == 0).view(draws, size)

    def about(self, index: Tensor) -> _Oracle:
        """The oracle for some of the examples."""
        return _Oracle(self.victim.take(index), self._threat, self._dtype, self.left)


def hop_skip_jump(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    queries: int = 1000,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Walk along the decision boundary towards the clean input.

    Each round estimates the boundary's normal from the answers at random points around the present one, steps along it
    as far as the input stays misclassified, and bisects between there and the clean input.

    Args:
        victim: the model under attack; asked for its ``score`` alone.
        x: clean inputs ``(B, ...)``.
        threat: ball (Linf or L2) and box.
        queries: questions an example, >= 1.
        samples: random points in the first round; ``samples * sqrt(t)`` in round t.
        generator: source of all randomness; None: a fresh one with seed 0.

    Returns:
        The nearest misclassified inputs found, wherever they are; ``x`` itself where there was none. ``(B, ...)``, in
        working precision. Where ``victim.stop_when_fooled``, examples leave once theirs is within the ball.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    clean = threat.to_pixels(working_precision(x))
    low, high = (threat.to_pixels(limit) for limit in threat.box(working_precision(x)))
    oracle = _Oracle(victim, threat, x.dtype, queries)
    best, alive = _starts(oracle, clean, low, high, generator)
    size, t = clean[0].numel(), 0
    halvings = math.ceil(math.log2(size) * (2.0 if threat.norm == "linf" else 1.5))  # the paper's theta
    while len(alive) and oracle.left > 0:
        origin, box, here = clean[alive], (low[alive], high[alive]), best[alive]
        asked = oracle.about(alive)
        if t > 0:
            distance = _distance(here, origin, threat.norm)
            around = distance / size if t > 1 else 0.1 * _width(*box)
            draws = min(asked.left, round(samples * math.sqrt(t)))
            direction = _normal(asked, here, box, around, draws, generator)
            direction = direction.sign() if threat.norm == "linf" else direction
            here = _jump(asked, here, box, direction, distance / math.sqrt(t))
        here = _bisected(asked, here, origin, threat.norm, halvings)
        nearer = _distance(here, origin, threat.norm) < _distance(best[alive], origin, threat.norm)
        best[alive[nearer]] = here[nearer]
        oracle.left, t = asked.left, t + 1
        if victim.stop_when_fooled:
            alive = alive[_distance(best[alive], origin, threat.norm) > threat.radius]
    return threat.from_pixels(best)


@dataclass(frozen=True)
class HopSkipJump(Attack):
    """Decision-based attack: labels only, neither gradients nor scores.

    A robust accuracy that falls under this attack but not under PGD is a sign of hidden gradients.

    Args:
        queries: questions an example, >= 1. Thousands, for inputs of more than a few hundred features.
        samples: random points in the first round, >= 1; ``samples * sqrt(t)`` in round t.

    Raises:
        ValueError: a setting is out of range; when it is called: the threat's norm is L1.

    Guarantees:
        No more than ``queries`` forward passes an example, and none with gradients.

    Reference:
        Chen et al., "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", 2020, algorithm 2.
    """

    family: ClassVar[str] = "blackbox"

    queries: int = 1000
    samples: int = 100

    def __post_init__(self) -> None:
        check_counts("hop_skip_jump", queries=self.queries, samples=self.samples)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "labels"})

    @property
    def passes(self) -> float:
        return self.queries / 2  # a forward pass is about half of a forward-backward pass

    def check(self, threat: Threat) -> None:
        if threat.norm not in NORMS:
            raise ValueError(f"hop_skip_jump works in the norms linf and l2, but threat.norm is {threat.norm}")

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return hop_skip_jump(victim, x, threat, queries=self.queries, samples=self.samples, generator=generator)


def _distance(a: Tensor, b: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm((a - b).reshape(len(a), -1), ord=math.inf if norm == "linf" else 2, dim=1)


def _width(low: Tensor, high: Tensor) -> Tensor:
    """The widest finite range of each example ``(B,)``, or 1."""
    width = torch.where(torch.isfinite(high - low), high - low, 0.0).reshape(len(low), -1).amax(1)
    return torch.where(width > 0, width, 1.0)


def _as(per_example: Tensor, like: Tensor) -> Tensor:
    return per_example.view(-1, *[1] * (like.ndim - 1))


def _starts(
    oracle: _Oracle, clean: Tensor, low: Tensor, high: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Misclassified inputs ``(B, ...)``, and the indices of the examples that have one and are right when clean.

    Uniform noise, as in the paper; where the model gives noise the example's own label, other inputs of the batch.
    """
    found, missing = clean.clone(), (~oracle.wrong(clean)).nonzero().flatten()
    right = missing
    floor, ceiling = low.nan_to_num(neginf=float(clean.min())), high.nan_to_num(posinf=float(clean.max()))
    for attempt in range(STARTS):
        if not len(missing) or oracle.left < 1:
            break
        shift = (attempt + 1) // 2
        if attempt % 2 and shift < len(clean):
            points = clean.roll(shift, 0).clamp(low, high)
        else:
            unit = torch.rand(clean.shape, generator=generator, dtype=clean.dtype, device=generator.device)
            points = floor + unit.to(clean.device) * (ceiling - floor)
        asked = oracle.about(missing)
        wrong = asked.wrong(points[missing])
        oracle.left = asked.left
        found[missing[wrong]] = points[missing[wrong]]
        missing = missing[~wrong]
    return found, right[~torch.isin(right, missing)]


def _bisected(oracle: _Oracle, wrong: Tensor, clean: Tensor, norm: str, halvings: int) -> Tensor:
    """Misclassified inputs close to the boundary, between ``wrong`` and the clean ones ``(B, ...)``."""
    distance, best = _distance(wrong, clean, norm), wrong
    right_share, wrong_share = torch.zeros_like(distance), torch.ones_like(distance)
    for _ in range(min(halvings, oracle.left)):
        share = (right_share + wrong_share) / 2
        if norm == "linf":
            reach = _as(share * distance, clean)
            middle = torch.clamp(wrong, clean - reach, clean + reach)
        else:
            middle = clean + _as(share, clean) * (wrong - clean)
        is_wrong = oracle.wrong(middle)
        best = torch.where(_as(is_wrong, clean), middle, best)
        right_share, wrong_share = (
            torch.where(is_wrong, right_share, share),
            torch.where(is_wrong, share, wrong_share),
        )
    return best


def _normal(
    oracle: _Oracle,
    here: Tensor,
    box: tuple[Tensor, Tensor],
    radius: Tensor,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """The direction into the misclassified side, of Euclidean length 1, from answers at ``draws`` points around."""
    answers, moves, both, asked = torch.zeros_like(radius), torch.zeros_like(here), torch.zeros_like(here), 0
    while asked < draws:
        count = min(max(1, ROWS // len(here)), draws - asked)
        unit = torch.randn(count, *here.shape, generator=generator, dtype=here.dtype, device=generator.device)
        unit = unit.to(here.device)
        unit = unit / unit.flatten(2).norm(dim=2).view(count, -1, *[1] * (here.ndim - 1))
        points = torch.clamp(here + _as(radius, here) * unit, *box)
        unit = (points - here) / _as(radius, here).clamp_min(torch.finfo(here.dtype).tiny)
        answer = oracle.wrong_each(points).to(here.dtype) * 2 - 1
        answers, moves = answers + answer.sum(0), moves + unit.sum(0)
        both = both + (answer.view(count, -1, *[1] * (here.ndim - 1)) * unit).sum(0)
        asked += count
    mean = answers / draws
    baseline = torch.where(mean.abs() < 1, mean, 0.0)  # equal answers all over: towards them, or away
    normal = both - _as(baseline, here) * moves
    return normal / _as(normal.reshape(len(normal), -1).norm(dim=1).clamp_min(1e-12), normal)


def _jump(
    oracle: _Oracle, here: Tensor, box: tuple[Tensor, Tensor], direction: Tensor, length: Tensor, halvings: int = 12
) -> Tensor:
    """The longest of ever halved steps that stays misclassified; ``here`` where none does."""
    landed, done = here, torch.zeros(len(here), dtype=torch.bool, device=here.device)
    for _ in range(min(halvings, oracle.left)):
        points = torch.clamp(here + _as(length, here) * direction, *box)
        wrong = oracle.wrong(points) & ~done
        landed = torch.where(_as(wrong, here), points, landed)
        done |= wrong
        if bool(done.all()):
            break
        length = length / 2
    return landed
