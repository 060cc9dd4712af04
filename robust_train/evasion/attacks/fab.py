"""The fast adaptive boundary attack: the nearest adversarial example that it can find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.margins import ScoreVictim, likeliest_wrong_classes, target_margin
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim, input_gradient

ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}


def fab(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    targets: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Tensor:
    """Walk along linearised decision boundaries, drawn towards the clean input, for one wrong class after the other.

    Args:
        victim: the model under attack; it needs logits ``(B, classes)`` and labels.
        x: clean inputs ``(B, ...)``.
        threat: norm and box; ``eps`` only decides what counts.
        steps: steps a target, >= 1.
        targets: wrong classes, those with the highest scores at ``x`` first; fewer where there are fewer.
        alpha_max: largest weight of the step that is taken from the clean input.
        eta: overshooting beyond the linearised boundary, >= 1.
        beta: how far a point that is misclassified is drawn back to the clean input, in (0, 1).

    Returns:
        Tensor of ``x``'s shape, in working precision: of each example the nearest misclassified point, or, where
        ``victim.stop_when_fooled``, the first one within ``eps``. ``x`` itself where none is within ``eps``, or where
        it is misclassified already. Nothing here is random.

    Reference:
        Croce & Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", 2020,
        algorithm 1, targeted as in "Reliable evaluation of adversarial robustness…", 2020, section 6.
    """
    clean = working_precision(x)
    found, size = clean.clone(), torch.full((len(x),), torch.inf, device=x.device, dtype=clean.dtype)
    wrong = likeliest_wrong_classes(victim, x, targets)
    alive = (victim.score(x) > 0).nonzero().flatten()
    for target in wrong.T:
        if len(alive) == 0:
            break
        goal = ScoreVictim(victim, target_margin, target).take(alive)
        stop = threat.radius if victim.stop_when_fooled else 0.0
        points, sizes = _nearest(goal, clean[alive], threat, steps, stop, alpha_max, eta, beta, x.dtype)
        better = (sizes <= threat.radius) & (sizes < size[alive])
        found[alive[better]], size[alive[better]] = points[better], sizes[better]
        if victim.stop_when_fooled:
            alive = alive[~better]
    return found


def _nearest(
    goal: ScoreVictim,
    origin: Tensor,
    threat: Threat,
    steps: int,
    stop: float,
    alpha_max: float,
    eta: float,
    beta: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Nearest misclassified points ``(B, ...)`` and their distances ``(B,)``; rows leave at a distance of ``stop``."""
    nearest, size = origin.clone(), torch.full((len(origin),), torch.inf, device=origin.device, dtype=origin.dtype)
    rows = torch.arange(len(origin), device=origin.device)
    here, clean, part = origin, origin, goal
    low, high = threat.box(origin)
    scale = threat.scale(origin)
    for _ in range(steps):
        grad, gap, _ = input_gradient(part, here.to(dtype))
        here = _step(here, clean, grad.to(here.dtype), gap.to(here.dtype), low, high, scale, threat, alpha_max, eta)
        out = (part.score(here.to(dtype)) == 0).nonzero().flatten()
        if len(out) == 0:
            continue
        distance = _norm((here[out] - clean[out]) * scale, threat.norm)
        closer = distance < size[rows[out]]
        nearest[rows[out[closer]]], size[rows[out[closer]]] = here[out[closer]], distance[closer]
        here = here.index_copy(0, out, clean[out] + beta * (here[out] - clean[out]))
        stay = size[rows] > stop
        if not bool(stay.all()):
            rows, here, clean, low, high = rows[stay], here[stay], clean[stay], low[stay], high[stay]
            if len(rows) == 0:
                break
            part = goal.take(rows)
    return nearest, size


def _step(
    here: Tensor,
    clean: Tensor,
    grad: Tensor,
    gap: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    threat: Threat,
    alpha_max: float,
    eta: float,
) -> Tensor:
    """Between the nearest points of the linearised boundary to ``here`` and to the clean input, a little beyond."""
    n = len(here)
    points = torch.cat([here, clean])
    normal = (grad / scale).flatten(1)
    moved = ((here - clean) * scale).flatten(1)
    need = torch.cat([-gap, (normal * moved).sum(1) - gap])  # what normal * delta must become
    up = ((torch.cat([high, high]) - points) * scale).flatten(1)
    down = ((points - torch.cat([low, low])) * scale).flatten(1)
    delta = to_hyperplane(torch.cat([normal, normal]), need, up, down, threat.norm)
    length = _norm(delta, threat.norm).clamp_min(1e-8)
    alpha = (length[:n] / (length[:n] + length[n:])).clamp_max(alpha_max).view(-1, *[1] * (here.ndim - 1))
    target = points + eta * delta.view_as(points) / scale
    return torch.clamp((1 - alpha) * target[:n] + alpha * target[n:], low, high)


def to_hyperplane(normal: Tensor, need: Tensor, up: Tensor, down: Tensor, norm: str) -> Tensor:
    """Shortest ``delta`` with ``normal @ delta = need`` and ``-down <= delta <= up``, row by row.

    Args:
        normal: normals of the hyperplanes ``(B, D)``.
        need: what the products must become ``(B,)``.
        up: how far each entry may rise ``(B, D)``, >= 0, perhaps infinite.
        down: how far it may fall, likewise.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.

    Returns:
        ``(B, D)``; where no such ``delta`` exists, the one that comes nearest to ``need``.

    Reference:
        Croce & Hein, "Minimally distorted Adversarial Examples…", 2020, section 2.2 and appendix A.
    """
    direction = normal * torch.where(need >= 0, 1.0, -1.0).to(normal)[:, None]
    weight, need = direction.abs(), need.abs()
    room = torch.where(direction > 0, up, down).clamp_min(0.0)
    room = torch.where(weight > 0, room, torch.zeros_like(room))
    if norm == "l1":  # the largest weights first, each up to its room
        order = weight.argsort(1, descending=True)
        sorted_weight, sorted_room = weight.gather(1, order), room.gather(1, order)
        gain = torch.where(sorted_weight > 0, sorted_weight * sorted_room, torch.zeros_like(room))
        spent = torch.nn.functional.pad(gain.cumsum(1)[:, :-1], (1, 0))
        wanted = (need[:, None] - spent) / sorted_weight.clamp_min(torch.finfo(weight.dtype).tiny)
        size = torch.zeros_like(weight).scatter(1, order, torch.minimum(wanted.clamp_min(0.0), sorted_room))
        return direction.sign() * size
    # size = min(multiplier * shape, room): the product is concave in the multiplier, so Newton's method from 0 rises
    # to the solution, and stays there
    shape = torch.ones_like(weight) if norm == "linf" else weight
    multiplier = torch.zeros_like(need)
    none = torch.zeros_like(weight)
    for _ in range(100):
        full = multiplier[:, None] * shape >= room
        gain = torch.where(full, weight * room, none).sum(1)
        slope = torch.where(full, none, weight * shape).sum(1)
        better = torch.where(slope > 0, (need - gain) / slope, torch.full_like(need, torch.finfo(need.dtype).max))
        better = torch.maximum(multiplier, better)
        if torch.equal(better, multiplier):
            break
        multiplier = better
    return direction.sign() * torch.minimum(multiplier[:, None] * shape, room)


def _norm(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=ORDERS[norm], dim=1)


@dataclass(frozen=True)
class FAB(Attack):
    """The fast adaptive boundary attack, targeted at the likeliest wrong classes.

    It looks for the smallest perturbation, not for the highest loss; what lies farther away than ``eps`` is dropped.

    Args:
        steps: steps a target, >= 1.
        targets: wrong classes tried, the likeliest first, >= 1; fewer where the task has fewer.
        alpha_max: largest weight of the step that is taken from the clean input, in [0, 1].
        eta: overshooting beyond the linearised boundary, >= 1.
        beta: how far a misclassified point is drawn back to the clean input, in (0, 1).

    Raises:
        ValueError: a setting is out of range; when it runs, a task without one class an example.

    Reference:
        Croce & Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", 2020.
    """

    family: ClassVar[str] = "minimum_norm"

    steps: int = 100
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_counts("fab", steps=self.steps, targets=self.targets)
        if not is_number(self.alpha_max) or not 0 <= self.alpha_max <= 1:
            raise ValueError(f"fab.alpha_max must be in [0, 1], got {self.alpha_max!r}")
        if not is_number(self.eta) or not self.eta >= 1:
            raise ValueError(f"fab.eta must be >= 1 and finite, got {self.eta!r}")
        if not is_number(self.beta) or not 0 < self.beta < 1:
            raise ValueError(f"fab.beta must be in (0, 1), got {self.beta!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss", "logits", "labels"})

    @property
    def passes(self) -> float:
        return 1.5 * self.steps * self.targets  # a gradient and a look at where it led, which is about half as much

    @property
    def starts_at_clean_input(self) -> bool:
        return True

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return fab(
            victim,
            x,
            threat,
            steps=self.steps,
            targets=self.targets,
            alpha_max=self.alpha_max,
            eta=self.eta,
            beta=self.beta,
        )
