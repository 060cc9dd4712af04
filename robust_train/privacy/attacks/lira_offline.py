"""LiRA, offline: how unlikely the audited model's confidence is for one that never saw the example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from robust_train.privacy.attacks._gaussian import check_variance, gaussians
from robust_train.privacy.attacks.base import MembershipAttack
from robust_train.privacy.membership import Signals, scaled


def lira_offline(target: np.ndarray, references: np.ndarray, out: np.ndarray, per_example: bool) -> np.ndarray:
    """One-sided test against the references that were not trained on an example.

    Args:
        target: scaled confidences under the audited model, float ``(N,)``.
        references: under the references, float ``(R, N)``.
        out: bool ``(R, N)``: which references were not trained on which example.
        per_example: estimate a variance for every example, instead of one for all.

    Returns:
        float ``(N,)``: logarithm of the probability that a normal variable with the references' mean and variance lies
        below ``target``; NaN where no reference is out.
    """
    mean, deviation = gaussians(references, out, per_example)
    return norm.logcdf(target, mean, deviation)


@dataclass(frozen=True)
class LiRAOffline(MembershipAttack):
    """Likelihood-ratio attack with references that were not trained on the example.

    Args:
        variance: ``"global"``: one variance for all examples; ``"example"``: one each; ``"auto"``: one each where every
            example has at least 32 such references, as the paper advises.

    Raises:
        ValueError: ``variance`` is something else.

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", 2022, section IV-B, equation 4.
    """

    variance: str = "auto"

    def __post_init__(self) -> None:
        check_variance("lira_offline", self.variance)

    @property
    def references(self) -> int:
        return 1

    def __call__(self, signals: Signals) -> np.ndarray:
        self.check(signals)
        likelihoods = bool((signals.losses >= 0).all() and (signals.references >= 0).all())
        out = ~signals.trained_on
        each = self.variance == "example" or (self.variance == "auto" and int(out.sum(0).min()) >= 32)
        return lira_offline(
            scaled(signals.losses, likelihoods), scaled(signals.references, likelihoods), out, per_example=each
        )
