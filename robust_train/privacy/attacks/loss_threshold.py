"""Loss threshold: members have a small loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from robust_train.privacy.attacks.base import MembershipAttack
from robust_train.privacy.membership import Signals


def loss_threshold(losses: np.ndarray) -> np.ndarray:
    """Scores from the audited model's losses alone.

    Args:
        losses: float ``(N,)``.

    Returns:
        float ``(N,)``: minus the loss.
    """
    return -losses


@dataclass(frozen=True)
class LossThreshold(MembershipAttack):
    """The loss itself: costs nothing, and is nearly blind at low false-positive rates.

    Reference:
        Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", 2018, adversary 1.
    """

    def __call__(self, signals: Signals) -> np.ndarray:
        return loss_threshold(signals.losses)
