"""Losses on the differences between class scores, and the victim that an attacker sees through one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust_train.evasion.victim import Victim, is_binary
from robust_train.evasion.wrapped import WrappedVictim

ScoreLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From scores ``(B, classes)``, true classes ``(B,)`` and targets ``(B,)`` to a loss an example ``(B,)``."""


def class_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``(B, classes)`` in float32 or wider and true classes ``(B,)`` of a task that has one label an example.

    Args:
        logits: ``(B, classes)``, or one score an example for two classes.
        labels: class indices ``(B,)``, class probabilities ``(B, classes)``, or 0 and 1 for one score an example. An
            index that is no class (an ignored label) counts as the nearest class.

    Raises:
        ValueError: dense predictions or a regression.
    """
    scores = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if is_binary(logits, labels):
        one = scores.flatten()
        return torch.stack([torch.zeros_like(one), one], 1), labels.flatten().long()
    if logits.ndim == 2 and logits.shape[1] > 1:
        if labels.is_floating_point() and labels.shape == logits.shape:
            return scores, labels.argmax(1)
        if labels.shape == logits.shape[:1] and not labels.is_floating_point():
            return scores, labels.long().clamp(0, logits.shape[1] - 1)
    raise ValueError(
        f"this attack is for one class an example: logits (B, classes) and class indices (B,), got logits "
        f"{tuple(logits.shape)} and labels {tuple(labels.shape)}. For dense predictions and regressions use PGD, which "
        "needs no more than the task's loss."
    )


def margin(scores: Tensor, truth: Tensor) -> Tensor:
    """Highest wrong score minus the true class's, ``(B,)``; > 0 where the example is misclassified."""
    wrong = scores.scatter(1, truth[:, None], -torch.inf).amax(1)
    return wrong - _of(scores, truth)


def dlr_loss(scores: Tensor, truth: Tensor, targets: Tensor) -> Tensor:
    """Difference of logits ratio, ``(B,)``: the margin over the distance between the first and the third score.

    With two classes there is no third score, and the margin itself is returned: attacks that follow the gradient's
    sign or direction do not see the difference.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness…", 2020, section 5, equation 6.
    """
    if scores.shape[1] < 3:
        return margin(scores, truth)
    top = scores.topk(3, 1).values
    return margin(scores, truth) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr_loss(scores: Tensor, truth: Tensor, targets: Tensor) -> Tensor:
    """Score of the target minus that of the true class, over ``z1 - (z3 + z4) / 2``; ``(B,)``.

    With three classes the third score takes the fourth's place; with two the difference itself is returned.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness…", 2020, section 5, equation 7.
    """
    if scores.shape[1] < 3:
        return target_margin(scores, truth, targets)
    top = scores.topk(min(4, scores.shape[1]), 1).values
    return target_margin(scores, truth, targets) / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)


def target_margin(scores: Tensor, truth: Tensor, targets: Tensor) -> Tensor:
    """Score of the target minus that of the true class, ``(B,)``."""
    return _of(scores, targets) - _of(scores, truth)


def likeliest_wrong_classes(victim: Victim, x: Tensor, count: int) -> Tensor:
    """The ``count`` wrong classes with the highest scores at ``x``, highest first; fewer where there are fewer.

    Returns:
        Class indices ``(B, min(count, classes - 1))``.
    """
    with torch.no_grad():
        scores, truth = class_scores(victim.logits(x), victim.known_labels())
    wrong = scores.scatter(1, truth[:, None], -torch.inf)
    return wrong.topk(min(count, scores.shape[1] - 1), 1).indices


class ScoreVictim(WrappedVictim):
    """A victim whose loss is a function of its class scores.

    Args:
        inner: the victim itself; it must provide logits and labels.
        rule: the loss.
        targets: what the rule gets as targets ``(B,)``; None: the labels.
    """

    def __init__(self, inner: Victim, rule: ScoreLoss, targets: Tensor | None = None) -> None:
        super().__init__(inner)
        self.rule, self.targets = rule, targets

    def loss(self, x: Tensor) -> Tensor:
        return self.loss_and_logits(x)[0]

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.inner.logits(x)
        scores, truth = class_scores(logits, self.known_labels())
        return self.rule(scores, truth, truth if self.targets is None else self.targets), logits

    def take(self, index: Tensor) -> ScoreVictim:
        targets = None if self.targets is None else self.targets[index]
        other = ScoreVictim(self.inner.take(index), self.rule, targets)
        other.found_scale = self.found_scale
        return other


def _of(scores: Tensor, classes: Tensor) -> Tensor:
    return scores.gather(1, classes[:, None]).squeeze(1)
