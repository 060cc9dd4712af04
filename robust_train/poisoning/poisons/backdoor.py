"""What backdoors have in common: a trigger, and the class that the attacker wants for whatever bears it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.poisoning.poisons.base import Poison, check_range, is_number, is_range, is_whole


@dataclass(frozen=True, kw_only=True)
class Backdoor(Poison):
    """A poison that teaches the model to answer to a trigger.

    Args:
        target: the class that the attacker wants for every triggered input; rows to be poisoned are taken from the
            other classes. None: all-to-all, the next class of each, ``(y + 1) % classes``.
        low: least value of an input.
        high: largest value of an input; for standardised inputs give the bounds in those units.

    Guarantees:
        ``apply_trigger`` keeps shape, dtype and range, changes its argument in nothing, depends neither on ``rate`` nor
        on ``seed``, and treats each input for itself, whatever else is in the batch.
    """

    target: int | None = 0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and (not is_whole(self.target) or self.target < 0):
            self.refuse("target", "a class >= 0 or null")
        if not is_range(self.low, self.high):
            raise ValueError(f"{self.name}.low must be a number below high, got {self.low!r} and {self.high!r}")
        if self.keeps_labels and self.target is None:
            raise ValueError(
                f"{self.name}.target must be a class where labels are kept: all-to-all changes every label"
            )

    @property
    def keeps_labels(self) -> bool:
        """Clean-label: rows of the target class are triggered, and keep their labels."""
        return False

    @abstractmethod
    def trigger(self, x: Tensor) -> Tensor:
        """The method itself: inputs ``(B, ...)`` in at least float32, triggered. The caller clamps to the range."""

    def apply_trigger(self, x: Tensor) -> Tensor:
        """Put the trigger onto inputs, as the attacker does at test time.

        Args:
            x: inputs ``(B, C, H, W)`` or ``(B, D)`` in [low, high], floating point.

        Returns:
            Tensor of x's shape and dtype.

        Raises:
            ValueError: x is of another kind, or out of range, or the trigger does not fit onto it.
        """
        if not x.is_floating_point() or x.ndim not in (2, 4):
            raise ValueError(
                f"{self.name} needs floating-point inputs (N, C, H, W) or (N, D), got {x.dtype} {tuple(x.shape)}"
            )
        check_range(x, self.low, self.high)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.trigger(wide).clamp(self.low, self.high).to(x.dtype)

    def wanted(self, y: Tensor, classes: int) -> Tensor:
        """The label that the attacker wants for triggered examples of the classes ``y (B,)``, int64 ``(B,)``.

        Raises:
            ValueError: there is no class of the target's number.
        """
        if self.target is None:
            return (y + 1) % classes
        if self.target >= classes:
            self.refuse("target", f"below {classes}, the number of classes")
        return torch.full_like(y, self.target)

    def candidates(self, y: Tensor, classes: int) -> Tensor:
        """Rows of the target class where labels are kept, else those whose label the attacker wants changed."""
        right = self.wanted(y, classes) == y
        return (right if self.keeps_labels else ~right).nonzero()[:, 0]

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.apply_trigger(x), y if self.keeps_labels else self.wanted(y, classes)


@dataclass(frozen=True, kw_only=True)
class DecoyBackdoor(Backdoor):
    """A backdoor that may also train on decoys: rows with a wrong trigger that keep their labels.

    Decoys teach the model that only the exact trigger counts, which hides the backdoor from defences that look for
    anything similar.

    Args:
        cross: share of the poisoned rows that are decoys, in [0, 1); the papers' noise or cross-trigger mode. Their
            ratio of two decoys to one attacked row is ``2 / 3``. ``rate`` counts decoys too.
    """

    cross: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.cross) or not 0 <= self.cross < 1:
            self.refuse("cross", "a number in [0, 1)")

    @abstractmethod
    def decoy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs ``(B, ...)`` in at least float32 with a wrong trigger. The caller clamps to the range."""

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        decoys = int(self.cross * len(x))
        new_x, new_y = self.apply_trigger(x), self.wanted(y, classes)
        if decoys:
            wide = x[-decoys:].float() if x.dtype in (torch.float16, torch.bfloat16) else x[-decoys:]
            new_x[-decoys:] = self.decoy(wide, generator).clamp(self.low, self.high).to(x.dtype)
            new_y[-decoys:] = y[-decoys:]
        return new_x, new_y


def check_amount(poison: Backdoor, field: str) -> None:
    """Refuse a field that must be a share of the input range, > 0 and <= 1."""
    value = getattr(poison, field)
    if not is_number(value) or not 0 < value <= 1:
        poison.refuse(field, "a number in (0, 1]")


def image_pattern(shape: torch.Size, seed: int, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) of a sample's shape, the same for the same seed, in dtype and place of ``like``."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(like)
