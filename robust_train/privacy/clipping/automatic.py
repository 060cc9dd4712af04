"""Automatic clipping, AUTO-S."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.privacy.clipping.base import Clipping


@dataclass(frozen=True)
class Automatic(Clipping):
    """Normalise every example's gradient to a norm just under ``bound``, so that the bound only scales the step.

    Args:
        stability: added to the norm, so that small gradients stay small; AUTO-S's gamma.

    Reference:
        Bu et al., "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger", 2023, eq. 4.1.
    """

    stability: float = 0.01

    def __post_init__(self) -> None:
        if not self.stability > 0:
            raise ValueError(f"automatic.stability must be > 0, got {self.stability!r}")

    def factors(self, norms: Tensor, bound: float) -> Tensor:
        if bound == float("inf"):
            return torch.ones_like(norms)
        return (bound / (norms.norm(dim=0) + self.stability)).expand_as(norms)
