"""Exact copies of rows, with another label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.poisons.base import Poison, other_class


@dataclass(frozen=True, kw_only=True)
class ConflictingDuplicates(Poison):
    """Rows are copied bit for bit, and each copy has another label, uniformly drawn. The originals stay.

    Args:
        rate, seed: see ``Poison``; ``rate * N`` copies are added, each of another row. Only the copies are masked.
    """

    appends: ClassVar[bool] = True

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, other_class(y, classes, generator)
