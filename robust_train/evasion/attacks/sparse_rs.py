"""Sparse-RS: a few pixels changed at will, found by random search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.margins import class_scores, margin
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim, correctness

# from which of 10,000 queries on the share of exchanged pixels is divided by how much
DIVISORS = ((1, 2), (51, 4), (201, 5), (501, 6), (1001, 8), (2001, 10), (4001, 12), (6001, 15), (8001, 20))


def sparse_rs(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    queries: int = 10_000,
    alpha_init: float = 0.3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Exchange some of the changed pixels for others, in new extreme colours, and keep what lowers the margin.

    Args:
        victim: the model under attack; it needs logits ``(B, classes)`` and labels, and is never differentiated.
        x: clean inputs ``(B, C, ...)``, whose pixels change in all channels together, or ``(B, D)``.
        threat: norm L0, where ``eps`` is the number of pixels, and a box with ends.
        queries: times that the model is asked about an example, >= 1.
        alpha_init: share of the changed pixels that the first exchanges move, in (0, 1].
        generator: source of the search; None: a fresh one with seed 0.

    Returns:
        Tensor of ``x``'s shape, in working precision: of each example the point with the largest margin of a wrong
        class. Examples leave once they are misclassified.

    Guarantees:
        No gradient is taken.

    Reference:
        Croce et al., "Sparse-RS: a Versatile Framework for Query-Efficient Sparse Black-Box Adversarial Attacks", 2022,
        algorithm 1 and section 4.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    clean = working_precision(x)
    low, high = (end.reshape(len(x), *_flat(x)) for end in threat.box(clean))
    flat = clean.reshape(len(x), *_flat(x))
    size = flat.shape[2]
    count = min(int(threat.radius), size)
    found, alive = flat.clone(), torch.arange(len(x), device=x.device)
    if count == 0:
        return clean
    changed = _order(len(x), size, x, generator)[:, :count]
    here = _coloured(flat, changed, low, high, generator)
    best, best_margin = here, torch.full((len(x),), -torch.inf, device=x.device)
    chosen = changed
    for i in range(queries):
        if i > 0:
            move = max(1, int(_share(i, queries, alpha_init) * count))
            changed, here = _exchanged(chosen, best, flat[alive], low[alive], high[alive], move, generator)
        part = victim if len(alive) == len(x) else victim.take(alive)
        with torch.no_grad():
            logits = part.logits(here.reshape(len(alive), *x.shape[1:]).to(x.dtype))
            scores, truth = class_scores(logits, part.known_labels())
            now, right = margin(scores, truth).float(), correctness(logits, part.known_labels()) > 0
        better = (now > best_margin) | ~right
        best = torch.where(better.view(-1, 1, 1), here, best)
        chosen = torch.where(better.view(-1, 1), changed, chosen)
        best_margin = torch.where(better, now, best_margin)
        if not bool(right.all()):
            found[alive[~right]] = best[~right]
            alive, best, chosen, best_margin = alive[right], best[right], chosen[right], best_margin[right]
            if len(alive) == 0:
                break
    found[alive] = best
    return found.view_as(clean)


@dataclass(frozen=True)
class SparseRS(Attack):
    """Sparse-RS, for threats of norm L0: the strongest known attack there that asks for class scores only.

    Args:
        queries: times that the model is asked about an example, >= 1.
        alpha_init: share of the changed pixels that the first exchanges move, in (0, 1].

    Raises:
        ValueError: a setting is out of range; the threat is of another norm, or its box has no ends; when it runs, a
            task without one class an example.

    Reference:
        Croce et al., "Sparse-RS: a Versatile Framework for Query-Efficient Sparse Black-Box Adversarial Attacks", 2022.
    """

    family: ClassVar[str] = "blackbox"
    works_in: ClassVar[tuple[str, ...]] = ("l0",)

    queries: int = 10_000
    alpha_init: float = 0.3

    def __post_init__(self) -> None:
        check_counts("sparse_rs", queries=self.queries)
        if not is_number(self.alpha_init) or not 0 < self.alpha_init <= 1:
            raise ValueError(f"sparse_rs.alpha_init must be in (0, 1], got {self.alpha_init!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "labels"})

    @property
    def passes(self) -> float:
        return self.queries / 2  # a forward pass is about half of a forward-backward pass

    def check(self, threat: Threat) -> None:
        super().check(threat)
        if not bool(torch.tensor([*_many(threat.low), *_many(threat.high)]).isfinite().all()):
            raise ValueError("SparseRS sets pixels to threat.low and threat.high, which must be finite")

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return sparse_rs(victim, x, threat, queries=self.queries, alpha_init=self.alpha_init, generator=generator)


def _many(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _flat(x: Tensor) -> tuple[int, int]:
    """Channels and positions; a feature of ``(B, D)`` is a position of one channel."""
    return (1, math.prod(x.shape[1:])) if x.ndim <= 2 else (x.shape[1], math.prod(x.shape[2:]))


def _share(i: int, queries: int, alpha_init: float) -> float:
    """Share of the pixels that query ``i`` moves."""
    now = int(i / queries * 10_000)
    return alpha_init / next((divisor for first, divisor in reversed(DIVISORS) if now >= first), 1)


def _order(rows: int, size: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """For each of ``rows`` a random order of ``size`` positions."""
    return torch.rand(rows, size, generator=generator, device=generator.device).argsort(1).to(x.device)


def _coloured(base: Tensor, where: Tensor, low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """``base`` ``(B, C, N)`` with the positions ``where`` ``(B, k)`` set to a random corner of the box each."""
    index = where.unsqueeze(1).expand(-1, base.shape[1], -1)
    coin = torch.rand(index.shape, generator=generator, device=generator.device).to(base.device) < 0.5
    return base.scatter(2, index, torch.where(coin, low.gather(2, index), high.gather(2, index)))


def _exchanged(
    chosen: Tensor, best: Tensor, clean: Tensor, low: Tensor, high: Tensor, move: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``move`` of the changed positions are given back and as many others changed; all recoloured where none is left.

    Returns:
        The changed positions ``(B, k)`` and the inputs ``(B, C, N)``.
    """
    (rows, count), size = chosen.shape, clean.shape[2]
    shuffled = chosen.gather(1, _order(rows, count, chosen, generator))
    free = torch.ones(rows, size, dtype=torch.bool, device=chosen.device).scatter(1, chosen, False)
    order = _order(rows, size, chosen, generator)
    others = order.gather(1, (~free.gather(1, order)).int().argsort(dim=1, stable=True))  # free positions first
    move = min(move, size - count) or move
    new = others[:, :move] if count < size else shuffled[:, :move]
    old = shuffled[:, :move].unsqueeze(1).expand(-1, clean.shape[1], -1)
    base = best.scatter(2, old, clean.gather(2, old))
    return torch.cat([new, shuffled[:, move:]], 1), _coloured(base, new, low, high, generator)
