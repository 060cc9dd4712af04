"""What a filter sees of the training rows, and what it says about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

NEEDS = ("inputs", "features", "logits", "dynamics", "trusted")


@dataclass(frozen=True)
class Rows:
    """What is known of N training rows. Whatever no filter asks for is None.

    Attributes:
        labels: class indices as the data set gives them, int64 ``(N,)``.
        classes: how many classes there are.
        inputs: as the data set gives them, ``(N, ...)``.
        features: what the last layer of a probe sees, ``(N, D)``; float16 and memory-mapped when large.
        logits: the probe's, ``(N, classes)``.
        losses: cross-entropy of each row in each epoch of the probe, ``(epochs, N)``; NaN where a row was not drawn.
        margins: logit of the label minus the largest other one, ``(epochs, N)``; NaN where a row was not drawn.
        reference: logits from models that were trained on trusted rows only, ``(N, classes)``.
        trusted_logits: the same for the trusted rows, each from a model that did not see it, ``(T, classes)``.
        trusted_labels: int64 ``(T,)``.
    """

    labels: Tensor
    classes: int
    inputs: Tensor | None = None
    features: Tensor | None = None
    logits: Tensor | None = None
    losses: Tensor | None = None
    margins: Tensor | None = None
    reference: Tensor | None = None
    trusted_logits: Tensor | None = None
    trusted_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def provides(self) -> frozenset[str]:
        """Which of ``NEEDS`` are there."""
        there = {
            "inputs": self.inputs,
            "features": self.features,
            "logits": self.logits,
            "dynamics": self.margins,
            "trusted": self.reference,
        }
        return frozenset(need for need, value in there.items() if value is not None)


@dataclass(frozen=True)
class Scores:
    """What a filter says of N rows.

    Attributes:
        values: suspicion, float32 ``(N,)``, finite; higher is more suspicious.
        groups: int64 ``(N,)``: rows with the same number >= 0 look as if they came from one hand, and are judged
            together; -1 where a row belongs to no such group. None: the filter knows no groups.
        p: p-values under the null distribution that ``null`` names, ``(N,)``; None where there is none.
        null: what the p-values assume, in a few words.
    """

    values: Tensor
    groups: Tensor | None = None
    p: Tensor | None = None
    null: str = ""


class Filter(ABC):
    """Suspicion scores for training rows.

    Attributes:
        needs: which parts of ``Rows`` it reads, of ``NEEDS``.
        finds: what it is meant for, of ``"label_noise"``, ``"backdoor"``, ``"duplicates"`` and ``"outliers"``.

    Guarantees:
        The scores do not depend on the order of the rows, are the same in every call, and are finite, also with
        constant features, a class of one row, or a single class.
    """

    needs: ClassVar[frozenset[str]]
    finds: ClassVar[frozenset[str]]

    @abstractmethod
    def score(self, rows: Rows) -> Scores:
        """Scores of rows that provide what it needs."""

    def __call__(self, rows: Rows) -> Scores:
        if missing := self.needs - rows.provides:
            raise ValueError(f"{type(self).__name__} needs {', '.join(sorted(missing))}, which was not gathered")
        scores = self.score(rows)
        if scores.values.shape != (len(rows),) or not torch.isfinite(scores.values).all():
            raise ValueError(f"{type(self).__name__} must return one finite score a row")
        return scores


def by_class(labels: Tensor, classes: int) -> list[Tensor]:
    """Row numbers of each class, in ascending order; empty for a class without rows."""
    return [(labels == c).nonzero()[:, 0] for c in range(classes)]
