"""Margin under models of trusted rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given, number
from robust_train.poisoning.filters.base import Filter, Rows, Scores

NULL = (
    "clean rows come from the same distribution as the trusted ones, which were scored by models that had not seen them"
)


def margin_against(logits: Tensor, labels: Tensor, *, temperature: float = 2.0) -> Tensor:
    """The largest probability of another class minus that of the label.

    Args:
        logits: ``(N, classes)``.
        labels: int64 ``(N,)``.
        temperature: by which the logits are divided before the softmax, > 0.

    Returns:
        float32 ``(N,)`` in [-1, 1].
    """
    probabilities = (logits.float() / temperature).softmax(1)
    own = probabilities.gather(1, labels[:, None])
    others = probabilities.scatter(1, labels[:, None], 0.0)
    return others.max(1).values - own[:, 0]


def p_values(scores: Tensor, null: Tensor) -> Tensor:
    """How rarely a score of the null is as high: ``(1 + #{null >= score}) / (T + 1)``.

    Args:
        scores: ``(N,)``.
        null: scores under the null hypothesis ``(T,)``.

    Returns:
        float32 ``(N,)`` in (0, 1].

    Guarantees:
        Where a row's score and those of the null are exchangeable, ``P(p <= a) <= a`` for every a.

    Reference:
        Vovk et al., "Algorithmic Learning in a Random World", 2005, section 2.3.
    """
    lower = torch.searchsorted(null.sort().values, scores.contiguous())
    return ((len(null) - lower + 1).double() / (len(null) + 1)).float()


@dataclass(frozen=True)
class TrustedMargin(Filter):
    """Rows whose label a model of trusted rows would not have given; for wrong labels of any kind.

    Each row is judged by itself: the score of one does not depend on the others. Rows whose label is right, as in
    clean-label poisoning, are hardly seen.

    Args:
        temperature: by which logits are divided before the softmax, > 0.

    Raises:
        ValueError: a setting is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trusted"})
    finds: ClassVar[frozenset[str]] = frozenset({"label_noise", "backdoor"})

    temperature: float = 2.0

    def __post_init__(self) -> None:
        number("trusted_margin.temperature", self.temperature, above=0.0, below=math.inf)

    def score(self, rows: Rows) -> Scores:
        reference = given("reference", rows.reference)
        values = margin_against(reference, rows.labels, temperature=self.temperature)
        if rows.trusted_logits is None or rows.trusted_labels is None:
            return Scores(values)
        null = margin_against(rows.trusted_logits, rows.trusted_labels, temperature=self.temperature)
        return Scores(values, p=p_values(values, null), null=NULL)
