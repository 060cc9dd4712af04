"""Auto-PGD: projected gradient ascent that chooses its step size by itself, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.margins import ScoreVictim, dlr_loss
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim, input_gradient

LOSSES = ("ce", "dlr")


def apgd(
    goals: Sequence[Victim],
    x: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    rho: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximise losses one after the other, each in a run from a random point of the ball's surface.

    A run halves an example's step size, and goes back to the best point so far, where the loss rose in too few of the
    steps since the last checkpoint or not at all. In L1 steps are sparse: their support and length follow from how
    sparse the best perturbation is, and a run goes through balls of radius 3, 2 and 1 ``eps``.

    Args:
        goals: victims whose loss ``(B,)`` is maximised, one a run: of the same model and labels.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        steps: gradient steps a run, >= 1.
        rho: share of the steps that must raise the loss for a step size to be kept, in [0, 1].
        generator: source of the starts; None: a fresh one with seed 0. The examples of a batch share each draw.

    Returns:
        Tensor of ``x``'s shape, in working precision. Where ``goals[0].stop_when_fooled``, examples leave the attack
        as soon as one of their iterates is misclassified, and that iterate is returned; of all others the point with
        the highest loss.

    Raises:
        ValueError: a goal's loss is not one number an example.

    Guarantees:
        What is found for an example depends neither on its place in the batch nor on the other examples, up to the
        rounding of the model.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness…", 2020, algorithm 1; for L1 Croce & Hein, "Mind
        the Box: l1-APGD for Sparse Adversarial Attacks", 2021, algorithm 1 and section 4.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    clean = working_precision(x)
    best = clean.clone()
    best_loss = torch.full((len(x),), -torch.inf, device=x.device, dtype=torch.float64)
    alive = torch.arange(len(x), device=x.device)  # examples that are not fooled yet
    for goal in goals:
        part = goal if len(alive) == len(x) else goal.take(alive)
        origin = clean[alive]
        here = _start(origin, threat, generator)
        *wider, (_, last) = _stages(threat, steps)
        for radius, length in wider:
            here, _, _ = _run(part, origin, here, threat.scaled(radius), length, rho, False, x.dtype)
        here, loss, fooled = _run(part, origin, here, threat, last, rho, goal.stop_when_fooled, x.dtype)
        better = fooled | (loss > best_loss[alive])
        best[alive[better]], best_loss[alive[better]] = here[better], loss[better].double()
        alive = alive[~fooled]
        if len(alive) == 0:
            break
    return best


def _stages(threat: Threat, steps: int) -> list[tuple[float, int]]:
    """Radii in multiples of ``eps``, the last one 1, each with its number of steps."""
    part = 3 * steps // 10 if threat.norm == "l1" else 0
    return [stage for stage in ((3.0, part), (2.0, part), (1.0, steps - 2 * part)) if stage[1] > 0]


def _start(origin: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """A random point of the ball's surface around each example, in the same direction for all of them."""
    kind = {"generator": generator, "dtype": origin.dtype, "device": generator.device}
    shape, tiny = (1, *origin.shape[1:]), torch.finfo(origin.dtype).tiny
    scale = threat.scale(origin)
    if threat.norm == "linf":
        noise = torch.rand(shape, **kind).to(origin.device) * 2 - 1
        noise = noise / noise.abs().max().clamp_min(tiny) * threat.radius
    else:
        noise = torch.randn(shape, **kind).to(origin.device)
        if threat.norm == "l2":
            noise = noise / torch.linalg.vector_norm(noise).clamp_min(tiny) * threat.radius
        else:  # far outside; the projection makes it sparse
            low, high = threat.box(origin)
            span = (high - low) * scale
            noise = noise * torch.where(torch.isfinite(span), span, torch.full_like(span, threat.radius))
    first = threat.scaled(3.0) if threat.norm == "l1" else threat
    return first.project(origin + noise / scale, origin)


@dataclass
class _State:
    """What a run knows of its examples, one a row."""

    rows: Tensor
    origin: Tensor
    low: Tensor
    high: Tensor
    here: Tensor
    previous: Tensor
    grad: Tensor
    loss: Tensor
    best: Tensor
    best_grad: Tensor
    best_loss: Tensor
    checked_loss: Tensor  # best loss at the last checkpoint
    rises: Tensor  # steps since then that raised the loss
    reduced: Tensor  # whether the step was made smaller then
    step: Tensor
    support: Tensor  # L1: share of the features that a step moves
    nonzero: Tensor  # L1: entries of the best perturbation at the last checkpoint

    def keep(self, mask: Tensor) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name)[mask])

    def back_to_best(self, which: Tensor) -> None:
        wide = _wide(which, self.here)
        self.here = torch.where(wide, self.best, self.here)
        self.grad = torch.where(wide, self.best_grad, self.grad)


def _run(
    goal: Victim,
    origin: Tensor,
    start: Tensor,
    threat: Threat,
    steps: int,
    rho: float,
    judged: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run: the points found ``(B, ...)``, their loss ``(B,)`` and which are misclassified ``(B,)``."""
    sparse = threat.norm == "l1"
    start = threat.project(start, origin)
    found, fooled = start.clone(), torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
    found_loss = torch.full((len(origin),), -torch.inf, device=origin.device, dtype=origin.dtype)
    s = _begin(origin, start, threat, 1.0 if sparse else 2.0)
    interval, since = max(int((0.04 if sparse else 0.22) * steps), 1), 0
    for i in range(steps + 1):
        part = goal if len(s.rows) == len(origin) else goal.take(s.rows)
        grad, loss, score = input_gradient(part, s.here.to(dtype))
        if loss.ndim != 1:
            raise ValueError("APGD adapts to each example and needs one loss an example; use PGD for a loss of a batch")
        s.grad, loss = grad.to(origin.dtype), loss.to(origin.dtype)
        if judged and score is not None and bool((score == 0).any()):
            out = score == 0
            found[s.rows[out]], found_loss[s.rows[out]], fooled[s.rows[out]] = s.here[out], loss[out], True
            s.keep(~out)
            loss = loss[~out]
            if len(s.rows) == 0:
                return found, found_loss, fooled
        better = loss > s.best_loss
        s.rises, s.loss = s.rises + (loss > s.loss), loss
        s.best_loss = torch.where(better, loss, s.best_loss)
        s.best = torch.where(_wide(better, s.here), s.here, s.best)
        s.best_grad = torch.where(_wide(better, s.here), s.grad, s.best_grad)
        if i == steps:
            break
        if i > 0:
            since += 1
        if since == interval:
            _make_sparse(s, threat) if sparse else _halve(s, interval, rho)
            since, interval = 0, interval if sparse else max(interval - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
        here = _sparse_step(s, threat) if sparse else _momentum_step(s, threat, 0.75 if i > 0 else 1.0)
        s.previous, s.here = s.here, here
    found[s.rows], found_loss[s.rows] = s.best, s.best_loss
    return found, found_loss, fooled


def _begin(origin: Tensor, start: Tensor, threat: Threat, first_step: float) -> _State:
    low, high = threat.limits(origin)
    n, features = len(origin), max(1, origin[0].numel())
    blank = torch.zeros_like(origin)
    each = torch.zeros(n, dtype=origin.dtype, device=origin.device)
    support, nonzero = each + 0.2, each + features
    if threat.norm == "l1":
        nonzero = _nonzero(start - origin)
        support = nonzero / features / 1.5
    return _State(
        rows=torch.arange(n, device=origin.device),
        origin=origin,
        low=low,
        high=high,
        here=start,
        previous=start,
        grad=blank,
        loss=each + torch.inf,
        best=start,
        best_grad=blank,
        best_loss=each - torch.inf,
        checked_loss=each - torch.inf,
        rises=each,
        reduced=torch.ones_like(each, dtype=torch.bool),
        step=each + first_step * threat.radius,
        support=support,
        nonzero=nonzero,
    )


def _momentum_step(s: _State, threat: Threat, weight: float) -> Tensor:
    """A steepest-ascent step of which ``weight`` counts, the rest being the last movement."""
    limits = (s.low, s.high)
    ahead = threat.project(s.here + threat.ascend(s.grad, 1.0) * _wide(s.step, s.here), s.origin, limits)
    mixed = s.here + weight * (ahead - s.here) + (1 - weight) * (s.here - s.previous)
    return threat.project(mixed, s.origin, limits)


def _halve(s: _State, interval: int, rho: float) -> None:
    """Checkpoint: smaller steps from the best point where the loss hardly rose."""
    stuck = (s.rises <= rho * interval) | (~s.reduced & (s.checked_loss >= s.best_loss))
    s.reduced, s.checked_loss, s.rises = stuck, s.best_loss, torch.zeros_like(s.rises)
    s.step = torch.where(stuck, s.step / 2, s.step)
    s.back_to_best(stuck)


def _sparse_step(s: _State, threat: Threat) -> Tensor:
    """A step of L1 length ``step``, the same on each of the features with the largest derivatives."""
    scale = threat.scale(s.here)
    grad = torch.where(s.high > s.low, s.grad / scale, torch.zeros_like(s.grad))
    size = grad.abs().flatten(1)
    features = size.shape[1]
    rank = ((1 - s.support) * features).clamp(0, features - 1).long()
    threshold = size.sort(1).values.gather(1, rank[:, None])
    sign = torch.where(size >= threshold, grad.flatten(1).sign(), torch.zeros_like(size))
    unit = (sign / sign.abs().sum(1, keepdim=True).clamp_min(1)).view_as(s.here)
    return threat.project(s.here + unit * _wide(s.step, s.here) / scale, s.origin, (s.low, s.high))


def _make_sparse(s: _State, threat: Threat) -> None:
    """Checkpoint: long steps from the best point while perturbations become sparser, shorter ones otherwise."""
    nonzero = _nonzero(s.best - s.origin)
    sparser = nonzero / s.nonzero < 0.95
    s.support, s.nonzero = nonzero / max(1, s.origin[0].numel()) / 1.5, nonzero
    longest = torch.full_like(s.step, threat.radius)
    s.step = torch.where(sparser, longest, (s.step / 1.5).clamp_min(threat.radius / 10))
    s.back_to_best(sparser)


def _nonzero(delta: Tensor) -> Tensor:
    return (delta != 0).flatten(1).sum(1).to(delta.dtype)


def _wide(each: Tensor, like: Tensor) -> Tensor:
    """One number an example ``(B,)``, shaped to broadcast against ``like``."""
    return each.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD on the task's own loss (cross-entropy for a classifier) or on the difference of logits ratio.

    Args:
        steps: gradient steps a run, >= 1.
        restarts: independent runs, >= 1.
        loss: ``"ce"``: the victim's loss of each example; ``"dlr"``: the difference of logits ratio, which does not
            change when logits are scaled; for one class an example.
        rho: share of the steps that must raise the loss for a step size to be kept, in [0, 1].

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020; for L1 Croce & Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks", 2021.
    """

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    rho: float = 0.75

    def __post_init__(self) -> None:
        check_counts("apgd", steps=self.steps, restarts=self.restarts)
        if self.loss not in LOSSES:
            raise ValueError(f"apgd.loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not is_number(self.rho) or not 0 <= self.rho <= 1:
            raise ValueError(f"apgd.rho must be in [0, 1], got {self.rho!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss", "per_example_loss"} if self.loss == "ce" else {"loss", "logits", "labels"})

    @property
    def passes(self) -> float:
        return float((self.steps + 1) * self.restarts)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        goal = victim if self.loss == "ce" else ScoreVictim(victim, dlr_loss)
        return apgd([goal] * self.restarts, x, threat, steps=self.steps, rho=self.rho, generator=generator)
