"""Membership inference: what the losses of a model say about who was in its training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_train.intervals import clopper_pearson
from robust_train.privacy.roc import auc

FPRS = (0.01, 0.001)


@dataclass(frozen=True)
class Signals:
    """What an attacker holds of N examples: their losses under the audited model and under R reference models.

    Args:
        losses: under the audited model, float ``(N,)``, finite.
        references: under the reference models, float ``(R, N)``, finite; R may be 0.
        trained_on: bool ``(R, N)``: which examples each reference was trained on.

    Raises:
        ValueError: shapes do not fit, or a loss is not finite.
    """

    losses: np.ndarray
    references: np.ndarray
    trained_on: np.ndarray

    def __post_init__(self) -> None:
        for name in ("losses", "references"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        shape = (len(self.references), len(self.losses))
        if self.losses.ndim != 1 or self.references.shape != shape or self.trained_on.shape != shape:
            raise ValueError(
                f"signals: references and trained_on must be of shape (R, {len(self.losses)}), got "
                f"{self.references.shape} and {self.trained_on.shape}"
            )
        if self.trained_on.dtype != bool:
            raise ValueError(f"signals.trained_on must be bool, got {self.trained_on.dtype}")
        if not np.isfinite(self.losses).all() or not np.isfinite(self.references).all():
            raise ValueError("signals: a loss is not finite")

    @property
    def count(self) -> int:
        """How many references there are."""
        return len(self.references)


@dataclass(frozen=True)
class Rate:
    """A true-positive rate at a false-positive rate.

    Args:
        value: share of the members that are found, in [0, 1].
        low: lower end of its 95 % Clopper-Pearson interval, for the threshold as it was chosen.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Leakage:
    """How well scores tell members from non-members.

    Args:
        auc: area under the ROC curve; 0.5 is guessing.
        low: lower end of its 95 % interval (DeLong).
        high: upper end.
        tpr: true-positive rates by false-positive rate; None, "n/a", where there are fewer non-members than one over
            the false-positive rate.
        members: how many were scored.
        others: how many non-members were scored.
    """

    auc: float
    low: float
    high: float
    tpr: dict[float, Rate | None]
    members: int
    others: int

    @property
    def half_width(self) -> float:
        """Of the interval of ``auc``."""
        return (self.high - self.low) / 2

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins."""
        rates = {f"{fpr:g}": None if rate is None else vars(rate).copy() for fpr, rate in self.tpr.items()}
        return {**vars(self), "half_width": self.half_width, "tpr": rates}


def measure(scores: np.ndarray, members: np.ndarray, fprs: Sequence[float] = FPRS) -> Leakage:
    """How well an attack's scores tell members from non-members.

    Args:
        scores: float ``(N,)``, higher for members; NaN where the attack has none for an example, which then does not
            count.
        members: bool ``(N,)``.
        fprs: false-positive rates in (0, 1).

    Raises:
        ValueError: no member, or no non-member, has a score.
    """
    found = ~np.isnan(scores)
    inside, outside = scores[found & members], scores[found & ~members]
    if not len(inside) or not len(outside):
        raise ValueError("membership inference needs scores of at least one member and one non-member")
    area, low, high = auc(inside, outside)
    tpr = {fpr: tpr_at_fpr(inside, outside, fpr) for fpr in fprs}
    return Leakage(area, low, high, tpr, len(inside), len(outside))


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float) -> Rate | None:
    """Share of the members that score above all but a share ``fpr`` of the non-members.

    Args:
        members: scores of members, float ``(m,)``.
        others: scores of non-members, float ``(n,)``.
        fpr: in (0, 1).

    Returns:
        The rate with its exact 95 % interval, which takes the threshold as given; None where ``n < 1 / fpr``.

    Guarantees:
        The threshold lets at most ``fpr * n`` non-members pass; no curve is interpolated.
    """
    n = len(others)
    allowed = int(fpr * n * (1 + 1e-12))
    if allowed < 1:
        return None
    threshold = np.sort(others)[n - 1 - allowed]
    passed = int((members > threshold).sum())
    return Rate(passed / len(members), *clopper_pearson(passed, len(members)))


def halves(examples: int, references: int, seed: int) -> np.ndarray:
    """Which examples each reference is to be trained on: about half, and each example by half of the references.

    Args:
        examples: how many, >= 2.
        references: how many, >= 1.
        seed: decides.

    Returns:
        bool ``(references, examples)``.

    Guarantees:
        Every example is in ``references / 2`` of the training sets (rounded up or down by chance where that is no whole
        number). A single reference has half of the examples, rounded down.

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", 2022, section V.
    """
    draw = np.random.default_rng(seed)
    if references == 1:
        return (draw.permutation(examples) < examples // 2)[None]
    order = draw.random((references, examples)).argsort(axis=0)
    counts = references // 2 + (draw.random(examples) < 0.5) * (references % 2)
    return order < counts


def confidences(losses: np.ndarray) -> np.ndarray:
    """``exp(-loss)``: of a cross-entropy, the probability that the model gives to the label."""
    return np.exp(-losses)


def scaled(losses: np.ndarray, likelihoods: bool) -> np.ndarray:
    """The statistic that is close to normal over models: ``log(p / (1 - p))`` with ``p = exp(-loss)``.

    Args:
        losses: of any shape.
        likelihoods: whether every loss, here and of the models compared with, is at least 0, so that ``exp(-loss)`` can
            be a probability; otherwise the statistic is ``-loss``.

    Reference:
        Carlini et al., 2022, section VI-A.
    """
    if not likelihoods:
        return -losses
    losses = np.maximum(losses, SMALLEST_LOSS)
    return -losses - np.log(-np.expm1(-losses))


SMALLEST_LOSS = 2.0**-24  # below it, float32 knows a cross-entropy as 0
