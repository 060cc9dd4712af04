"""TRADES: the user's loss on clean inputs plus a penalty for predictions that a perturbation can move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.victim import Victim


def prediction_divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """KL divergence ``KL(softmax(logits) || softmax(logits_adv))`` of each example, ``(B,)``.

    One score an example is read as a two-class problem; dense predictions are averaged over their positions.

    Args:
        logits: scores of the clean inputs ``(B, classes, ...)``.
        logits_adv: scores of the adversarial inputs, same shape.
    """
    if logits.ndim < 2 or logits.shape[1] == 1:
        logits, logits_adv = (
            torch.stack([torch.zeros_like(z), z], 1) for z in (logits.flatten(), logits_adv.flatten())
        )
    log_p, log_q = F.log_softmax(logits.float(), 1), F.log_softmax(logits_adv.float(), 1)
    each = (log_p.exp() * (log_p - log_q)).sum(1)
    return each.flatten(1).mean(1) if each.ndim > 1 else each


class _DivergenceVictim(Victim):
    """The victim with the divergence from its clean predictions as the loss to be increased."""

    def __init__(self, victim: Victim, clean_logits: Tensor) -> None:
        self._victim, self._clean = victim, clean_logits
        self.provides = frozenset({"loss", "per_example_loss"})
        self.gradient_scale, self.gradients = victim.gradient_scale, victim.gradients

    def loss(self, x: Tensor) -> Tensor:
        return prediction_divergence(self._clean, self._victim.logits(x))

    def undisturbed(self):  # noqa: ANN201
        return self._victim.undisturbed()

    def network(self):  # noqa: ANN201
        return self._victim.network()

    def reseeded(self, seed: int):  # noqa: ANN201
        return self._victim.reseeded(seed)


@dataclass(frozen=True)
class TRADES(Objective):
    """``own loss on x + beta * KL(f(x) || f(x_adv))``, with ``x_adv`` found by maximising the same divergence.

    Args:
        beta: weight of the divergence, >= 0; larger trades clean accuracy for robustness.

    Raises:
        ValueError: ``beta`` is out of range.

    Guarantees:
        With ``eps = 0`` the gradient equals the user's own up to float rounding.

    Reference:
        Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", 2019, section 3.3, equation
        5.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    replaces_loss: ClassVar[bool] = True
    trains_on: ClassVar[str] = "clean"
    uses_logits: ClassVar[bool] = True

    beta: float = 6.0

    def __post_init__(self) -> None:
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not number or not 0 <= self.beta < float("inf"):
            raise ValueError(f"trades.beta must be >= 0 and finite, got {self.beta!r}")

    @property
    def extra_passes(self) -> float:
        return 1.0

    def attacked(self, victim: Victim, x: Tensor) -> Victim:
        with torch.no_grad(), victim.undisturbed():
            return _DivergenceVictim(victim, victim.logits(x).detach())

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        if logits is None:
            raise ValueError("TRADES needs the logits of the training step")
        return self.beta * prediction_divergence(logits, victim.logits(x_adv)).mean()
