"""Flat clipping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust_train.privacy.clipping.base import Clipping

STABILITY = 1e-6  # as in Opacus, with which the factors are equal to the bit


@dataclass(frozen=True)
class Flat(Clipping):
    """Scale an example's whole gradient down to norm ``bound``; smaller ones are left alone.

    Reference:
        Abadi et al., "Deep Learning with Differential Privacy", 2016, algorithm 1.
    """

    def factors(self, norms: Tensor, bound: float) -> Tensor:
        total = norms.norm(dim=0)
        return (bound / (total + STABILITY)).clamp(max=1.0).expand_as(norms)
