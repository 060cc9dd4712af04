"""Area under the margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust_train.poisoning.filters._check import given
from robust_train.poisoning.filters._dynamics import mean_over_epochs
from robust_train.poisoning.filters.base import Filter, Rows, Scores


def area_under_margin(margins: Tensor) -> Tensor:
    """Mean over the epochs of the label's logit minus the largest other one.

    Args:
        margins: ``(epochs, N)``, NaN where a row was not drawn in an epoch.

    Returns:
        float32 ``(N,)``; a row that was never drawn gets the median of the others.

    Reference:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020, section 3.
    """
    return mean_over_epochs(margins)


@dataclass(frozen=True)
class AUM(Filter):
    """Rows whose label the probe learned late or never; the score is minus the area under the margin.

    A backdoor is learned early, and looks cleaner than clean rows here: use another filter against it. The paper finds
    its threshold with an extra class in the model, which is not done here.

    Reference:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020, section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"dynamics"})
    finds: ClassVar[frozenset[str]] = frozenset({"label_noise"})

    def score(self, rows: Rows) -> Scores:
        return Scores(-area_under_margin(given("margins", rows.margins)))
