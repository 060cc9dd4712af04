"""Means over the epochs of a probe in which not every row was drawn each time."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1e30  # a mean of overflowed losses must still fit into float32


def mean_over_epochs(values: Tensor) -> Tensor:
    """Mean of each row over the epochs in which it was drawn.

    Args:
        values: ``(epochs, N)``, NaN where a row was not drawn.

    Returns:
        float32 ``(N,)``, finite; a row that was never drawn gets the median of those that were (0 where none was), so
        that it is neither suspected nor cleared.
    """
    values = values.double().clamp(-LARGEST, LARGEST)  # NaN stays NaN
    drawn = ~values.isnan()
    count = drawn.sum(0)
    means = values.nan_to_num(0.0).sum(0) / count.clamp_min(1)
    seen = means[count > 0]
    return means.where(count > 0, seen.median() if len(seen) else torch.zeros_like(means)).float()
