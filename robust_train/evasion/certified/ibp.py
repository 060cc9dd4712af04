"""Interval bound propagation: the last layers folded into the question, boxes before them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust_train.evasion.certified.interval import Interval
from robust_train.evasion.certified.verifier import Verifier, class_differences, lower_bounds


def ibp_margins(logits: Interval, labels: Tensor) -> Tensor:
    """Lower bounds of the true class's score minus each class's, ``(B, classes)``.

    The affine layers at the end are folded into the differences, whose bounds are tighter than differences of bounds.

    Args:
        logits: what a module made of the box of inputs.
        labels: class indices ``(B,)``.
    """
    rows, _ = class_differences(logits, labels)
    return lower_bounds(rows, logits, through_relu=False)


@dataclass(frozen=True)
class IBP(Verifier):
    """Boxes through every layer: cheap, loose for networks that were not trained for it, tight for those that were.

    Reference:
        Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
        sections 3 and 4.
    """

    def margins(self, logits: Interval, labels: Tensor) -> Tensor:
        return ibp_margins(logits, labels)
