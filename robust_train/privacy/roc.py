"""The area under a ROC curve and its confidence interval."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm, rankdata


def auc(members: np.ndarray, others: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Area under the ROC curve, and its interval by DeLong's method.

    Args:
        members: scores of members, float ``(m,)``, m >= 1.
        others: scores of non-members, float ``(n,)``, n >= 1.
        confidence: in (0, 1).

    Returns:
        The probability that a random member scores above a random non-member, ties counted half; and the ends of the
        interval around it. Where the two are separated without an exception DeLong's variance is zero, which says too
        much: there the end is the exact one for ``min(m, n)`` disjoint pairs.

    Reference:
        DeLong et al., "Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves: A
        Nonparametric Approach", 1988.
    """
    m, n = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[:m] - rankdata(members)) / n  # for each member, the share of non-members below it
    below = 1 - (ranks[m:] - rankdata(others)) / m
    area = float(above.mean())
    if area in (0.0, 1.0):
        far = ((1 - confidence) / 2) ** (1 / min(m, n))
        return area, min(area, far), max(area, 1 - far)
    variance = _variance(above) / m + _variance(below) / n
    reach = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    return area, max(0.0, area - reach), min(1.0, area + reach)


def _variance(values: np.ndarray) -> float:
    """Unbiased; of a single value, the largest that values in [0, 1] can have."""
    return float(values.var(ddof=1)) if len(values) > 1 else 0.25
