"""MART: adversarial training that leans on the examples which the model gets wrong when clean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.objectives.trades import prediction_divergence
from robust_train.evasion.victim import Victim, is_binary


def rows_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Everything that has a label of its own, as rows: examples, or the positions of dense predictions.

    Args:
        logits: ``(B, classes, ...)``, or one score an example, read as a two-class problem.
        labels: class indices ``(B, ...)``; class probabilities of the logits' shape, of which the most probable counts;
            or 0 and 1 for one score an example.

    Returns:
        Scores ``(N, classes)`` in float32 or wider, class indices ``(N,)``, and whether the label is a class, bool
        ``(N,)`` (ignored positions are none; their index is 0).
    """
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if is_binary(logits, labels):
        one = scores.flatten()
        return torch.stack([torch.zeros_like(one), one], 1), labels.flatten().long(), torch.ones_like(one).bool()
    classes = scores.shape[1]
    truth = (labels.argmax(1) if labels.is_floating_point() else labels).long().flatten()
    known = (truth >= 0) & (truth < classes)
    return scores.movedim(1, -1).reshape(-1, classes), truth.masked_fill(~known, 0), known


def runner_up_penalty(scores: Tensor, truth: Tensor) -> Tensor:
    """``-log(1 - max_{k != y} p_k)`` of each row, ``(N,)``: what MART adds to the cross-entropy.

    Args:
        scores: ``(N, classes)``.
        truth: class indices ``(N,)``.
    """
    highest = scores.detach().scatter(1, truth[:, None], -torch.inf).argmax(1, keepdim=True)
    others = scores.masked_fill(F.one_hot(highest.squeeze(1), scores.shape[1]).bool(), -torch.inf)
    return scores.logsumexp(1) - others.logsumexp(1)  # without the difference 1 - p, which rounds to 0


def weighted_divergence(scores: Tensor, scores_adv: Tensor, truth: Tensor) -> Tensor:
    """``KL(p(x) || p(x_adv)) * (1 - p_y(x))`` of each row, ``(N,)``.

    Args:
        scores: of clean inputs ``(N, classes)``.
        scores_adv: of adversarial inputs, same shape.
        truth: class indices ``(N,)``.
    """
    doubt = 1 - scores.softmax(1).gather(1, truth[:, None]).squeeze(1)
    return prediction_divergence(scores, scores_adv) * doubt


@dataclass(frozen=True)
class MART(Objective):
    """``own loss on x_adv - log(1 - max_{k != y} p_k(x_adv)) + beta * KL(p(x) || p(x_adv)) * (1 - p_y(x))``.

    With cross-entropy as the user's own loss, its first two terms are the paper's boosted cross-entropy; the last
    counts more for examples that the model is unsure of when clean. Adversarial inputs maximise the own loss, as in
    plain adversarial training.

    Args:
        beta: weight of the divergence, >= 0.

    Raises:
        ValueError: ``beta`` is out of range.

    Guarantees:
        With cross-entropy as the own loss, it is the paper's loss. With ``eps = 0`` the divergence adds no gradient.

    Reference:
        Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", 2020, section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "labels"})
    uses_logits: ClassVar[bool] = True

    beta: float = 5.0

    def __post_init__(self) -> None:
        number = isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool)
        if not number or not 0 <= self.beta < float("inf"):
            raise ValueError(f"mart.beta must be >= 0 and finite, got {self.beta!r}")

    @property
    def extra_passes(self) -> float:
        return 1.0

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        if logits is None:
            raise ValueError("MART needs the logits of the training step")
        labels = victim.known_labels()
        scores_adv, truth, known = rows_of(logits, labels)
        scores, _, _ = rows_of(victim.logits(x), labels)
        each = runner_up_penalty(scores_adv, truth) + self.beta * weighted_divergence(scores, scores_adv, truth)
        return (each * known).sum() / known.sum().clamp_min(1)
