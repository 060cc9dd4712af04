"""What LiRA's two variants share."""

from __future__ import annotations

from typing import Any

import numpy as np

VARIANCES = ("auto", "global", "example")
LEAST = 1e-6  # of a standard deviation: confidences that do not move at all say nothing about how far they could


def gaussians(values: np.ndarray, chosen: np.ndarray, per_example: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each example over the models that are chosen for it.

    Args:
        values: float ``(R, N)``.
        chosen: bool ``(R, N)``.
        per_example: a deviation for every example, instead of one that is pooled within examples over all.

    Returns:
        Two float ``(N,)``. Where no model is chosen the mean is NaN. Where nothing can be said about a deviation,
        because no example has two models, it is 1, which is then the same for all.
    """
    count = chosen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(chosen, values, 0.0).sum(0) / count
    squares = np.where(chosen, (values - mean) ** 2, 0.0).sum(0)
    freedom = np.maximum(count - 1, 0)
    pooled = squares[count > 0].sum() / freedom.sum() if freedom.any() else 1.0
    variance = np.full(len(count), pooled)
    if per_example:
        variance = np.where(freedom > 0, squares / np.maximum(freedom, 1), pooled)
    return mean, np.maximum(np.sqrt(variance), LEAST)


def check_variance(attack: str, value: Any) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: it is none.
    """
    if value not in VARIANCES:
        raise ValueError(f"{attack}.variance must be {', '.join(VARIANCES[:-1])} or {VARIANCES[-1]}, got {value!r}")
