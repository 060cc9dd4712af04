"""Confident learning."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.filters._check import given
from robust_train.poisoning.filters.base import Filter, Rows, Scores

METHODS = ("normalized_margin", "self_confidence")


def label_doubt(logits: Tensor, labels: Tensor, *, method: str = "normalized_margin", adjust: bool = True) -> Tensor:
    """One minus cleanlab's label quality.

    Args:
        logits: of models that did not see the row they judge ``(N, classes)``.
        labels: int64 ``(N,)``.
        method: ``"normalized_margin"``, of the label's probability over the largest other one, or
            ``"self_confidence"``, the label's probability alone.
        adjust: subtract from each class's probability its mean among rows of that label first, which is the class
            threshold of confident learning.

    Returns:
        float32 ``(N,)`` in [0, 1]; all 0 where there is one class only.

    Raises:
        ImportError: cleanlab is not installed; the message says how to install it.

    Reference:
        Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021, section 3.
    """
    if logits.shape[1] < 2:
        return torch.zeros(len(labels))
    try:
        rank = importlib.import_module("cleanlab.rank")
    except ImportError as cause:
        raise ImportError(
            'confident_learning needs cleanlab: pip install "robust-train[cleanlab]"', name="cleanlab"
        ) from cause
    quality = rank.get_label_quality_scores(
        labels.cpu().numpy(), logits.double().softmax(1).cpu().numpy(), method=method, adjust_pred_probs=adjust
    )
    return (1.0 - torch.from_numpy(quality)).float()


@dataclass(frozen=True)
class ConfidentLearning(Filter):
    """Rows whose label the probe gives a low probability, measured against what is usual for that class.

    The probe's logits must come from models that did not see the row they judge (cross-validation): a model that has
    memorised a wrong label has no doubt of it. A backdoor is learned in every fold and is not seen here.

    Args:
        method: ``"normalized_margin"`` or ``"self_confidence"``.
        adjust: subtract the class thresholds of confident learning.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021, section 3; computed by
        cleanlab, an optional extra.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    finds: ClassVar[frozenset[str]] = frozenset({"label_noise"})

    method: str = "normalized_margin"
    adjust: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"confident_learning.method must be one of {', '.join(METHODS)}, got {self.method!r}")

    def score(self, rows: Rows) -> Scores:
        return Scores(label_doubt(given("logits", rows.logits), rows.labels, method=self.method, adjust=self.adjust))
