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

    With ``wanted``, the classes that a backdoor's attacker wants, it is the success rate of a trigger: of the examples
    that are not of the wanted class, the share that is predicted to be, however the clean ones are classified.

    Shapes: ``update(clean_preds, preds, target, wanted=None)``, predictions as in ``survivors``, ``wanted`` as
    ``target``; ``clean_preds`` may be None with ``wanted``. ``compute()`` is a scalar in [0, 1], NaN when there was
    nothing to fool.

    Raises:
        ValueError: in ``update``: shapes that do not fit, or neither ``clean_preds`` nor ``wanted``.

    Reference:
        Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017 (triggers).
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

    def update(
        self, clean_preds: Tensor | None, preds: Predictions, target: Tensor, wanted: Tensor | None = None
    ) -> None:
        if wanted is not None:
            others = wanted != target
            hit = survivors(preds, wanted)  # right about the wanted class, so wrong about its own
        elif clean_preds is not None:
            others = predicted(clean_preds) == target
            hit = ~survivors(preds, target)
        else:
            raise ValueError("attack success rate: give clean_preds, or the classes that a trigger's attacker wanted")
        self.fooled += (others & hit).sum()
        self.right += others.sum()

    def compute(self) -> Tensor:
        return self.fooled / self.right
