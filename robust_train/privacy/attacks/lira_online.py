"""LiRA, online: is the audited model's confidence that of a model that saw the example, or of one that did not?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from robust_train.privacy.attacks._gaussian import check_variance, gaussians
from robust_train.privacy.attacks.base import MembershipAttack
from robust_train.privacy.membership import Signals, scaled


def lira_online(target: np.ndarray, references: np.ndarray, trained_on: np.ndarray, per_example: bool) -> np.ndarray:
    """Likelihood ratio of two normal distributions for every example.

    Args:
        target: scaled confidences under the audited model, float ``(N,)``.
        references: under the references, float ``(R, N)``.
        trained_on: bool ``(R, N)``: which references were trained on which example.
        per_example: estimate variances for every example, instead of one for all members and one for all others.

    Returns:
        float ``(N,)``: log density of the references that were trained on the example, minus that of those that were
        not; NaN where there are none of one kind.
    """
    inside = gaussians(references, trained_on, per_example)
    outside = gaussians(references, ~trained_on, per_example)
    return norm.logpdf(target, *inside) - norm.logpdf(target, *outside)


@dataclass(frozen=True)
class LiRAOnline(MembershipAttack):
    """Likelihood-ratio attack with references of both kinds.

    Args:
        variance: ``"global"``: one variance for all examples; ``"example"``: one each; ``"auto"``: one each where every
            example has at least 32 references of each kind, as the paper advises.

    Raises:
        ValueError: ``variance`` is something else.

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", 2022, algorithm 1.
    """

    variance: str = "auto"

    def __post_init__(self) -> None:
        check_variance("lira_online", self.variance)

    @property
    def references(self) -> int:
        return 4

    def __call__(self, signals: Signals) -> np.ndarray:
        self.check(signals)
        likelihoods = bool((signals.losses >= 0).all() and (signals.references >= 0).all())
        fewest = int(min(signals.trained_on.sum(0).min(), (~signals.trained_on).sum(0).min()))
        each = self.variance == "example" or (self.variance == "auto" and fewest >= 32)
        return lira_online(
            scaled(signals.losses, likelihoods),
            scaled(signals.references, likelihoods),
            signals.trained_on,
            per_example=each,
        )
