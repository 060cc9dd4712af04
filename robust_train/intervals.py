"""Confidence intervals of measured shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import beta

CONFIDENCE = 0.95


def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact binomial interval of a share.

    Args:
        successes: how many of the examples, 0 to ``n``.
        n: examples, >= 1.
        confidence: in (0, 1).

    Returns:
        Smallest and largest share that a two-sided test does not refuse.

    Raises:
        ValueError: a number is out of range.

    Guarantees:
        Whatever the true share, the interval covers it with a probability of at least ``confidence``.

    Reference:
        Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.
    """
    _check(n, confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n = {n}, got {successes}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def hoeffding(mean: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval of the mean of ``n`` independent numbers in [0, 1], wider than the binomial one.

    Args:
        mean: of the numbers.
        n: of them, >= 1.
        confidence: in (0, 1).

    Raises:
        ValueError: a number is out of range.

    Guarantees:
        It covers the true mean with a probability of at least ``confidence``.

    Reference:
        Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", 1963, theorem 1.
    """
    _check(n, confidence)
    if not 0 <= mean <= 1:
        raise ValueError(f"mean must be from 0 to 1, got {mean}")
    reach = math.sqrt(math.log(2 / (1 - confidence)) / (2 * n))
    return max(mean - reach, 0.0), min(mean + reach, 1.0)


@dataclass(frozen=True)
class Rate:
    """A measured share and its 95 % interval.

    Attributes:
        value: the share, 0 to 1.
        low: lower end of the interval.
        high: upper end.
        n: examples.
        interval: ``"clopper-pearson"``, or ``"hoeffding"`` where examples count by shares of their own (segmentation,
            models that draw at random).
    """

    value: float
    low: float
    high: float
    n: int
    interval: str = "clopper-pearson"

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """As plain builtins."""
        return asdict(self)


def rate_of(scores: Sequence[float], confidence: float = CONFIDENCE) -> Rate:
    """The mean of the examples' scores with its interval.

    Args:
        scores: one an example, in [0, 1]; 0 or 1 throughout for the binomial interval.
        confidence: in (0, 1).

    Raises:
        ValueError: there are none, or one is not in [0, 1].
    """
    n = len(scores)
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError("scores must be in [0, 1]")
    _check(n, confidence)
    mean = math.fsum(scores) / n
    if all(score in (0, 1) for score in scores):
        return Rate(mean, *clopper_pearson(round(mean * n), n, confidence), n)
    return Rate(mean, *hoeffding(mean, n, confidence), n, "hoeffding")


def _check(n: int, confidence: float) -> None:
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
