"""RMIA: how much more likely the audited model finds an example than other models do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_train.privacy.attacks.base import MembershipAttack
from robust_train.privacy.membership import Signals, confidences

SMALLEST = 1e-30  # of a confidence


def rmia(target: np.ndarray, references: np.ndarray, trained_on: np.ndarray, offline_scale: float) -> np.ndarray:
    """Log-ratio of the audited model's confidence to the mean confidence of models at large.

    A model at large was trained on an example with probability one half. Its confidence is the mean of what references
    that were trained on the example say and of what the others say; where there are only others, the first is taken
    to be ``offline_scale * others + (1 - offline_scale)``.

    Args:
        target: confidences under the audited model, in [0, 1], float ``(N,)``.
        references: under the references, float ``(R, N)``.
        trained_on: bool ``(R, N)``: which references were trained on which example.
        offline_scale: in [0, 1].

    Returns:
        float ``(N,)``; NaN where every reference was trained on the example.

    Note:
        The paper's score is the share of population points that an example dominates. When all examples are compared
        with the same points, that share rises with this ratio and with nothing else: ranking, AUC and rates are the
        same, without ties and without points that must be set aside.

    Reference:
        Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", 2024, sections 3 and B.2.
    """
    ins, outs = trained_on.sum(0), (~trained_on).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        outside = np.where(trained_on, 0.0, references).sum(0) / outs
        inside = np.where(trained_on, references, 0.0).sum(0) / ins
    assumed = offline_scale * outside + (1 - offline_scale)
    at_large = (np.where(ins > 0, inside, assumed) + outside) / 2
    return np.log(np.maximum(target, SMALLEST)) - np.log(np.maximum(at_large, SMALLEST))


@dataclass(frozen=True)
class RMIA(MembershipAttack):
    """Robust membership inference attack: the strongest one for few references.

    Args:
        offline_scale: what to assume of a model's confidence in an example that no reference was trained on, in [0, 1]:
            ``offline_scale * others + (1 - offline_scale)``. The paper's value for CIFAR-10; it matters with a single
            reference only, where half of the examples have no score.

    Raises:
        ValueError: ``offline_scale`` is out of range.

    Reference:
        Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", 2024.
    """

    offline_scale: float = 0.3

    def __post_init__(self) -> None:
        value: Any = self.offline_scale
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"rmia.offline_scale must be a number in [0, 1], got {value!r}")

    @property
    def references(self) -> int:
        return 1

    def __call__(self, signals: Signals) -> np.ndarray:
        self.check(signals)
        return rmia(
            confidences(signals.losses), confidences(signals.references), signals.trained_on, self.offline_scale
        )
