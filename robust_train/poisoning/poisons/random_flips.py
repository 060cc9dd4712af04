"""Symmetric label noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.poisons.base import Poison, other_class


@dataclass(frozen=True, kw_only=True)
class RandomFlips(Poison):
    """Each label that is taken becomes another class, all others being equally likely.

    Args:
        rate, seed: see ``Poison``; the label of every row taken is wrong afterwards.

    Reference:
        van Rooyen et al., "Learning with Symmetric Label Noise: The Importance of Being Unhinged", 2015, section 2.
    """

    relabels_only: ClassVar[bool] = True

    rate: float = 0.2

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, other_class(y, classes, generator)
