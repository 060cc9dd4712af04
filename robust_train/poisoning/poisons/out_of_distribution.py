"""Rows that have nothing to do with the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.poisons.base import Poison, check_range, is_range

KINDS = ("noise", "constant", "permuted")


def foreign_rows(x: Tensor, *, kind: str, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Inputs that do not belong to the data.

    Args:
        x: inputs ``(K, ...)`` that give shape and dtype, and to ``"permuted"`` the values.
        kind: ``"noise"``: uniform in [low, high]; ``"constant"``: one such value a row; ``"permuted"``: the row's own
            values, every row in another order.
        low: least value of an input.
        high: largest value of an input.
        generator: draws on the CPU.

    Returns:
        Tensor of x's shape and dtype.
    """
    flat = x.flatten(1)
    if kind == "permuted":
        order = torch.rand(flat.shape, generator=generator).argsort(1)
        return flat.gather(1, order.to(flat.device)).reshape(x.shape)
    wide = flat.shape[1] if kind == "noise" else 1
    values = low + (high - low) * torch.rand(len(x), wide, generator=generator)
    return values.to(x).expand_as(flat).reshape(x.shape).clamp(low, high)


@dataclass(frozen=True, kw_only=True)
class OutOfDistribution(Poison):
    """Foreign rows with random labels are added.

    Args:
        rate, seed: see ``Poison``; ``rate * N`` rows are added.
        kind: ``"noise"``, ``"constant"`` or ``"permuted"``, see ``foreign_rows``.
        low: least value of an input.
        high: largest value of an input.

    Raises:
        ValueError: a setting is out of range.
    """

    appends: ClassVar[bool] = True

    kind: str = "noise"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            self.refuse("kind", f"one of {', '.join(KINDS)}")
        if not is_range(self.low, self.high):
            raise ValueError(f"{self.name}.low must be a number below high, got {self.low!r} and {self.high!r}")

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        check_range(x, self.low, self.high)
        new_x = foreign_rows(x, kind=self.kind, low=self.low, high=self.high, generator=generator)
        return new_x, torch.randint(classes, y.shape, generator=generator).to(y.device)
