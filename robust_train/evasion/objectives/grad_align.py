"""Gradient alignment: a penalty where the input gradient turns within the ball, against catastrophic overfitting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim


def misalignment(gradient: Tensor, other: Tensor) -> Tensor:
    """``1 - cosine`` of the angle between the gradients of each example, ``(B,)``; 0 where either vanishes.

    Args:
        gradient: in the clean inputs ``(B, ...)``.
        other: in the perturbed inputs, same shape.
    """
    a, b = gradient.float().flatten(1), other.float().flatten(1)
    sizes = [g.detach().abs().amax(1) for g in (a, b)]
    usable = (sizes[0] > 0) & (sizes[1] > 0)
    # enlarged first: an example's share of a mean loss is small, and its square may underflow
    a, b = (g / s.clamp_min(torch.finfo(g.dtype).tiny)[:, None] for g, s in zip((a, b), sizes, strict=True))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    return torch.where(usable, 1 - cosine, torch.zeros_like(cosine))


@dataclass(frozen=True)
class GradAlign(Objective):
    """Own loss on ``x_adv`` plus ``weight * (1 - cos(gradient at x, gradient at a random point of the ball))``.

    Where the gradient in the input has the same direction all over the ball, one step finds what many would, and
    training on one step (``FGSM``) does not overfit to it. The penalty is the mean over the examples and is
    differentiated a second time: it costs two passes to the input and their derivatives on every batch.

    Args:
        weight: of the penalty, >= 0; the paper has 0.2 for CIFAR-10 within 8/255, more for larger balls.

    Raises:
        ValueError: ``weight`` is out of range.

    Note:
        Needs layers that can be differentiated twice; cuDNN's recurrent layers and some fused attention kernels
        cannot be.

    Guarantees:
        With ``weight = 0`` training is bit-identical to training with ``PGDAT()``.

    Reference:
        Andriushchenko & Flammarion, "Understanding and Improving Fast Adversarial Training", 2020, section 5.
    """

    weight: float = 0.2

    def __post_init__(self) -> None:
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < float("inf"):
            raise ValueError(f"grad_align.weight must be >= 0 and finite, got {self.weight!r}")

    @property
    def extra_passes(self) -> float:
        return 3.0 if self.weight else 0.0

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        return None

    def penalty(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor | None:
        if not self.weight:
            return None
        gradients = []
        with torch.enable_grad():
            for point in (x, threat.random_start(x, generator)):
                here = point.detach().requires_grad_(True)
                loss = victim.loss(here).sum().float() * victim.gradient_scale
                (gradient,) = torch.autograd.grad(loss, here, create_graph=True)
                gradients.append(gradient)
            return self.weight * misalignment(*gradients).mean()
