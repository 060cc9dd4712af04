"""CROWN-IBP: linear bounds of the scores through boxes of the layers within."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import is_number
from robust_train.evasion.certified.ibp import ibp_margins
from robust_train.evasion.certified.interval import Interval
from robust_train.evasion.certified.verifier import Verifier, class_differences, lower_bounds


def crown_margins(logits: Interval, labels: Tensor) -> Tensor:
    """Lower bounds of the true class's score minus each class's, ``(B, classes)``, by a linear function of the input.

    Other activations than ReLU, and max pooling, are taken from the boxes: bounds as true, and less tight.

    Args:
        logits: what a module made of the box of inputs.
        labels: class indices ``(B,)``.
    """
    rows, _ = class_differences(logits, labels)
    return lower_bounds(rows, logits, through_relu=True)


@dataclass(frozen=True)
class CROWNIBP(Verifier):
    """Trains on ``beta * CROWN + (1 - beta) * IBP``, beta falling from 1 with the schedule; verifies with the better.

    Costs about as many passes backwards as there are classes.

    Args:
        last_beta: CROWN's share when the schedule has ended, in [0, 1]; 0 ends with IBP alone.

    Raises:
        ValueError: ``last_beta`` is out of range.

    Guarantees:
        Its margins are nowhere below those of ``IBP``.

    Reference:
        Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks", 2020, section 3.3.
    """

    last_beta: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.last_beta) or not 0 <= self.last_beta <= 1:
            raise ValueError(f"crown_ibp.last_beta must be in [0, 1], got {self.last_beta!r}")

    def margins(self, logits: Interval, labels: Tensor) -> Tensor:
        return torch.maximum(crown_margins(logits, labels), ibp_margins(logits, labels))

    def training_margins(self, logits: Interval, labels: Tensor, progress: float) -> Tensor:
        beta = 1 - progress * (1 - self.last_beta)
        intervals = ibp_margins(logits, labels)
        return intervals if beta == 0 else beta * crown_margins(logits, labels) + (1 - beta) * intervals
