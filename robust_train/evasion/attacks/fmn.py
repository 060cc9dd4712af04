"""The fast minimum-norm attack: how far is the nearest adversarial example?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.margins import ScoreVictim, margin
from robust_train.evasion.randomness import preserved_rng
from robust_train.evasion.threat import Threat, parse_number
from robust_train.evasion.victim import Victim, input_gradient

DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}  # the order of the norm that bounds the change of a linear loss
LAST = 1e-5  # the last step, as a share of the first


def onto_balls(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """The nearest perturbations whose norm is at most ``radius``.

    Args:
        delta: perturbations ``(B, ...)``.
        radius: one for each example ``(B,)``, >= 0.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
    """
    flat, limit = delta.reshape(len(delta), -1), radius[:, None]
    if norm == "linf":
        out = torch.minimum(torch.maximum(flat, -limit), limit)
    elif norm == "l2":
        size = flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        out = flat * (limit / size).clamp(max=1.0)
    else:  # shrink all entries by the same amount, found among the sums of the largest ones
        size = flat.abs().sort(dim=1, descending=True).values
        count = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device)
        amounts = (size.cumsum(1) - limit) / count
        shrink = amounts.amax(1, keepdim=True).clamp_min(0.0)
        out = flat.sign() * (flat.abs() - shrink).clamp_min(0.0)
    return out.view_as(delta)


def fmn(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    steps: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
    enough: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Descend on the margin within a ball whose radius shrinks while the example is adversarial and grows while not.

    Args:
        victim: the model under attack; it has logits ``(B, classes)`` and labels.
        x: clean inputs ``(B, ...)``.
        threat: norm and box; ``eps`` plays no part.
        steps: gradient steps, >= 1.
        step_size: Euclidean length of the first step in pixels, the later ones shorter on a cosine; None: the range
            ``high - low``, or 1 where it is infinite.
        gamma: first relative change of the radius, in (0, 1); later ones smaller on the same cosine.
        enough: stop once every example has an adversarial perturbation this short.

    Returns:
        The nearest adversarial inputs found ``(B, ...)`` (the last ones tried where none was), and the norms of their
        perturbations in pixels, float64 ``(B,)``: 0 where the clean input is misclassified, inf where none was found.

    Note:
        Two things are added to the paper's algorithm, without which examples in the corner of a box (black pixels) are
        often never found: entries of the gradient that the box blocks are left out, and a radius within which nothing
        has been found yet grows by ``gamma`` at least.

    Guarantees:
        Every finite norm is that of an input which the victim has misclassified.

    Reference:
        Pintor et al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints", 2021, algorithm 1.
    """
    goal = ScoreVictim(victim, lambda scores, truth, _: margin(scores, truth))
    clean = working_precision(x)
    (low, high), std = threat.box(clean), threat.scale(clean)
    first = _range(threat) if step_size is None else step_size
    ones = [1] * (x.ndim - 1)
    here, best = clean, clean.clone()
    best_norm = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    radius = torch.zeros(len(x), dtype=clean.dtype, device=x.device)

    def keep(loss: Tensor) -> Tensor:
        """Note which of the inputs just tried are adversarial, and which are the nearest so far."""
        norm = threat.size(here.to(x.dtype), x)
        nearer = (loss > 0) & (norm < best_norm)
        best[nearer], best_norm[nearer] = here.to(x.dtype).to(clean.dtype)[nearer], norm[nearer]
        return norm.to(clean.dtype)

    for k in range(steps):
        share = LAST + (1 - LAST) * (1 + math.cos(math.pi * k / steps)) / 2
        grad, loss, _ = input_gradient(goal, here.to(x.dtype))
        found_before = best_norm.isfinite()
        norm = keep(loss)
        if bool((best_norm <= enough).all()):
            return best, best_norm
        blocked = torch.where(grad > 0, here >= high, here <= low)  # by the box
        grad = torch.where(blocked, 0.0, grad.to(clean.dtype) / std)  # in pixels
        flat = grad.reshape(len(x), -1)
        slope = torch.linalg.vector_norm(flat, ord=DUAL[threat.norm], dim=1).clamp_min(torch.finfo(flat.dtype).tiny)
        to_boundary = (norm - loss.to(clean.dtype) / slope).nan_to_num(posinf=0.0)
        shrunk = torch.minimum(radius * (1 - gamma * share), best_norm.to(clean.dtype))
        grown = radius * (1 + gamma * share)
        grown = torch.where(found_before, grown, torch.maximum(to_boundary, grown))
        radius = torch.where(loss > 0, shrunk, grown)
        length = flat.norm(dim=1).clamp_min(torch.finfo(flat.dtype).tiny).view(-1, *ones)
        delta = (here - clean) * std + first * share * grad / length
        here = torch.clamp(clean + onto_balls(delta, radius, threat.norm) / std, low, high)
    with torch.no_grad():
        keep(goal.loss(here.to(x.dtype)))
    return torch.where(best_norm.isfinite().view(-1, *ones), best, here), best_norm


@dataclass(frozen=True)
class FMN(Attack):
    """Fast minimum-norm attack: the nearest adversarial example, whatever ``eps`` is.

    As an attack it returns the nearest example found, put back into the ball where it is farther than ``eps``.
    ``norms`` returns how far each was: the median of it, or the share above ``eps`` for every ``eps`` at once.

    Args:
        steps: gradient steps, >= 1.
        step_size: Euclidean length of the first step in pixels, a number or a fraction; None: the range of the inputs.
        gamma: first relative change of the radius, in (0, 1).

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Pintor et al., "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints", 2021, algorithm 1.
    """

    family: ClassVar[str] = "minimum_norm"

    steps: int = 100
    step_size: float | str | None = None
    gamma: float = 0.05

    def __post_init__(self) -> None:
        check_counts("fmn", steps=self.steps)
        if self.step_size is not None:
            size = parse_number("fmn.step_size", self.step_size)
            if not 0 < size < float("inf"):
                raise ValueError(f"fmn.step_size must be > 0 and finite, got {self.step_size}")
            object.__setattr__(self, "step_size", size)
        if not is_number(self.gamma) or not 0 < self.gamma < 1:
            raise ValueError(f"fmn.gamma must be in (0, 1), got {self.gamma!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "labels"})

    @property
    def passes(self) -> float:
        return float(self.steps)

    @property
    def starts_at_clean_input(self) -> bool:
        return True

    def norms(self, victim: Victim, x: Tensor, threat: Threat) -> Tensor:
        """Norms of the smallest adversarial perturbations found, in pixels.

        Args:
            victim: the model under attack; afterwards it is as before.
            x: clean inputs ``(B, ...)``.
            threat: norm and box; ``eps`` plays no part.

        Returns:
            float64 ``(B,)``: 0 where the clean input is misclassified, inf where no perturbation was found.
        """
        with preserved_rng(x.device), victim.undisturbed():
            return fmn(victim, x.detach(), threat, steps=self.steps, step_size=self._step, gamma=self.gamma)[1]

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        enough = threat.radius if victim.stop_when_fooled else 0.0
        return fmn(victim, x, threat, steps=self.steps, step_size=self._step, gamma=self.gamma, enough=enough)[0]

    @property
    def _step(self) -> float | None:
        return None if self.step_size is None else float(self.step_size)


def _range(threat: Threat) -> float:
    """The mean of ``high - low``, or 1 where that is infinite."""
    mean = float((torch.tensor(threat.high) - torch.tensor(threat.low)).mean())
    return mean if math.isfinite(mean) else 1.0
