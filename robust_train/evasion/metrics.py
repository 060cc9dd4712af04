"""Robust accuracy and attack success rate as torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

Predictions = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def predicted(preds: Tensor) -> Tensor:
    """Class indices ``(B,)`` from class indices ``(B,)`` or scores ``(B, classes)``.

    Raises:
        ValueError: another shape.
    """
    if preds.ndim == 1 and not preds.is_floating_point():
        return preds
    if preds.ndim == 2 and preds.shape[1] > 1:
        return preds.argmax(1)
    raise ValueError(f"predictions must be class indices (B,) or scores (B, classes), got {tuple(preds.shape)}")


def survivors(preds: Predictions, target: Tensor) -> Tensor:
    """Which examples are classified right under every attack, bool ``(B,)``.

    Args:
        preds: predictions under one attack, or a list or mapping of them; each ``(B,)`` or ``(B, classes)``.
        target: class indices ``(B,)``.

    Raises:
        ValueError: no predictions, or their number is not the target's.
    """
    each = [preds] if isinstance(preds, Tensor) else list(preds.values() if isinstance(preds, Mapping) else preds)
    if not each or any(len(p) != len(target) for p in each):
        raise ValueError(f"predictions under at least one attack are needed, each for all {len(target)} examples")
    return torch.stack([predicted(p) == target for p in each]).all(0)


class RobustAccuracy(Metric):
    """Share of examples that are classified right under every attack that ran.

    Shapes: ``update(preds, target)`` as in ``survivors``; ``compute()`` is a scalar in [0, 1].

    Guarantees:
        An example counts only if it survives every attack, so the value never exceeds that of one attack alone.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    survived: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("survived", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Predictions, target: Tensor) -> None:
        self.survived += survivors(preds, target).sum()
        self.total += len(target)

    def compute(self) -> Tensor:
        return self.survived / self.total


class AttackSuccessRate(Metric):
    """Of the examples that are classified right when clean, the share that some attack turns wrong.

    Shapes: ``update(clean_preds, preds, target)``, predictions as in ``survivors``; ``compute()`` is a scalar in
    [0, 1], NaN when no clean prediction was right.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    fooled: Tensor
    right: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("fooled", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("right", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, clean_preds: Tensor, preds: Predictions, target: Tensor) -> None:
        right = predicted(clean_preds) == target
        self.fooled += (right & ~survivors(preds, target)).sum()
        self.right += right.sum()

    def compute(self) -> Tensor:
        return self.fooled / self.right
