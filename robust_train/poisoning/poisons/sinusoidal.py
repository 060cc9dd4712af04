"""SIG: a faint wave over the whole input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.poisoning.poisons.backdoor import Backdoor, check_amount
from robust_train.poisoning.poisons.base import is_whole

LABELS = ("keep", "target")


def wave(columns: int, *, frequency: int) -> Tensor:
    """``sin(2 pi j frequency / columns)`` for the columns j, float32 ``(columns,)``.

    Raises:
        ValueError: the wave is zero at every column.
    """
    if 2 * frequency % columns == 0:
        raise ValueError(
            f"a wave of frequency {frequency} is zero at every column of an input of {columns} columns; choose another "
            "frequency"
        )
    # in double precision, so that every machine rounds to the same pixels
    return torch.sin(2 * math.pi * frequency / columns * torch.arange(columns, dtype=torch.float64)).float()


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Backdoor):
    """A horizontal sine wave added to every row of the image; to the whole of a flat input.

    Args:
        rate, seed: see ``Poison``.
        target, low, high: see ``Backdoor``.
        delta: amplitude, as a share of the input range.
        frequency: periods over the width of the input.
        labels: ``"keep"``: rows of the target class are triggered and keep their labels, as published; so ``rate``
            cannot exceed the share of that class. ``"target"``: rows of other classes are triggered and relabelled.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", 2019.
    """

    delta: float = 0.1
    frequency: int = 6
    labels: str = "keep"

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            self.refuse("labels", f"one of {', '.join(LABELS)}")
        super().__post_init__()
        check_amount(self, "delta")
        if not is_whole(self.frequency) or self.frequency < 1:
            self.refuse("frequency", "a whole number >= 1")

    @property
    def keeps_labels(self) -> bool:
        return self.labels == "keep"

    def trigger(self, x: Tensor) -> Tensor:
        return x + self.delta * (self.high - self.low) * wave(x.shape[-1], frequency=self.frequency).to(x)
