"""Per-layer clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from robust_train.privacy.clipping.base import Clipping
from robust_train.privacy.clipping.flat import STABILITY


@dataclass(frozen=True)
class PerLayer(Clipping):
    """Scale the gradient of each of the P parameters down to norm ``bound / sqrt(P)`` by itself.

    Reference:
        McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018, section 2.1.
    """

    def factors(self, norms: Tensor, bound: float) -> Tensor:
        return (bound / math.sqrt(len(norms)) / (norms + STABILITY)).clamp(max=1.0)
