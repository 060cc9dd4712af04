"""The small-loss criterion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust_train.poisoning.filters._check import given, whole
from robust_train.poisoning.filters._dynamics import mean_over_epochs
from robust_train.poisoning.filters.base import Filter, Rows, Scores


def mean_loss(losses: Tensor, *, skip: int = 1) -> Tensor:
    """Mean loss of each row over the epochs after the first ``skip``.

    Args:
        losses: ``(epochs, N)``, NaN where a row was not drawn in an epoch.
        skip: epochs at the start that do not count, because the loss there depends on when in the epoch a row came.

    Returns:
        float32 ``(N,)``; a row that was never drawn after them gets the median of the others.

    Raises:
        ValueError: no epoch is left.

    Reference:
        Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", 2018, section 3.
    """
    if skip >= len(losses):
        raise ValueError(
            f"small_loss.skip is {skip}, and the probe ran {len(losses)} epochs: lower it, or train the probe longer"
        )
    return mean_over_epochs(losses[skip:])


@dataclass(frozen=True)
class SmallLoss(Filter):
    """Rows with a large loss while the probe is trained, as those with wrong labels have before they are memorised.

    A backdoor has a small loss: use another filter against it. Co-teaching itself, two networks that choose rows for
    one another in every batch, is not done here.

    Args:
        skip: epochs at the start that do not count, >= 0.

    Raises:
        ValueError: a setting is out of range, or the probe ran no more than ``skip`` epochs.

    Reference:
        Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", 2018, section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"dynamics"})
    finds: ClassVar[frozenset[str]] = frozenset({"label_noise"})

    skip: int = 1

    def __post_init__(self) -> None:
        whole("small_loss.skip", self.skip, low=0)

    def score(self, rows: Rows) -> Scores:
        return Scores(mean_loss(given("losses", rows.losses), skip=self.skip))
