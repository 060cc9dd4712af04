"""Pair-wise label noise: each class is taken for the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.poisons.base import Poison


@dataclass(frozen=True, kw_only=True)
class PairFlips(Poison):
    """Each label that is taken becomes the next class, ``(y + 1) % classes``.

    Args:
        rate, seed: see ``Poison``.

    Reference:
        Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", 2018, section 4.
    """

    relabels_only: ClassVar[bool] = True

    rate: float = 0.2

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, (y + 1) % classes
