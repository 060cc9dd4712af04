"""What every simulated poison has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor


@dataclass(frozen=True)
class Changes:
    """The rows that a poison makes out of some of the training rows.

    Attributes:
        rows: which training rows were taken, int64 ``(K,)``, on the CPU.
        x: what became of their inputs, ``(K, ...)``.
        y: what became of their labels, int64 ``(K,)``.
    """

    rows: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Poisoned:
    """A poisoned copy of N training rows; M = N, or more where rows were added at the end.

    Attributes:
        x: inputs ``(M, ...)``.
        y: labels, int64 ``(M,)``.
        mask: which rows were changed or added, bool ``(M,)``.
    """

    x: Tensor
    y: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Poison(ABC):
    """How an attacker poisons training data. For measuring defences, on your own data.

    To add one, write a file with a pure function and a frozen dataclass that implements ``change``, and a yaml of the
    same name in ``conf/poison/``; the contract tests find it there.

    Args:
        rate: rows that are changed or added, as a share of all training rows, in (0, 1]. It must come to at least one
            row.
        seed: decides which rows are taken, and all else that is drawn for them.

    Attributes:
        appends: rows are added at the end, and the given ones left as they are.
        relabels_only: only labels change.

    Guarantees:
        ``round(rate * N)`` rows are changed or added; x, y and the global random state are left as they were; the same
        seed gives the same result; with the same seed, a higher rate takes the rows of a lower one and more.
    """

    appends: ClassVar[bool] = False
    relabels_only: ClassVar[bool] = False

    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.rate) or not 0 < self.rate <= 1:
            self.refuse("rate", "a number in (0, 1]")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**63:
            self.refuse("seed", "a whole number >= 0 and < 2 ** 63")

    @property
    def name(self) -> str:
        """Under which messages speak of it."""
        return type(self).__module__.rpartition(".")[2]

    def refuse(self, field: str, must_be: str) -> NoReturn:
        """Raise the error for a field that has a wrong value."""
        raise ValueError(f"{self.name}.{field} must be {must_be}, got {getattr(self, field)!r}")

    def candidates(self, y: Tensor, classes: int) -> Tensor:
        """Numbers of the rows that may be taken, int64; by default all."""
        return torch.arange(len(y))

    @abstractmethod
    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What becomes of the rows that were taken.

        Args:
            x: their inputs ``(K, ...)``; not to be written into.
            y: their labels, int64 ``(K,)``; not to be written into.
            classes: how many classes there are.
            generator: the only source of randomness; it draws on the CPU.

        Returns:
            Inputs of x's shape and dtype, and labels of y's.
        """

    def changes(self, read: Callable[[Tensor], Tensor], y: Tensor, classes: int) -> Changes:
        """Choose rows and change them, without holding the inputs of the others.

        Args:
            read: gives the inputs ``(K, ...)`` of row numbers ``(K,)``.
            y: labels of all rows, int64 ``(N,)``.
            classes: how many classes there are, >= 2.

        Raises:
            ValueError: labels or inputs do not fit, or there are too few rows for the rate.
        """
        if y.ndim != 1 or y.dtype != torch.int64 or len(y) == 0:
            raise ValueError(f"labels must be int64 of shape (N,), N >= 1, got {y.dtype} {tuple(y.shape)}")
        if classes < 2 or not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"labels must lie in 0 ... {classes - 1} and classes be >= 2, got labels up to {y.max()}")
        generator = torch.Generator().manual_seed(self.seed)
        pool = self.candidates(y.cpu(), classes)
        count = round(self.rate * len(y))
        if not 1 <= count <= len(pool):
            raise ValueError(
                f"{self.name}.rate={self.rate} of {len(y)} rows comes to {count} rows, but it must be between 1 and "
                f"{len(pool)}, the number of rows that this poison may take"
            )
        rows = pool[torch.randperm(len(pool), generator=generator)[:count]]
        x = read(rows)
        if not x.is_floating_point() or x.ndim < 2:
            raise ValueError(f"inputs must be floating point and (N, ...), got {x.dtype} {tuple(x.shape)}")
        return Changes(rows, *self.change(x, y[rows.to(y.device)], classes, generator))

    def __call__(self, x: Tensor, y: Tensor, classes: int) -> Poisoned:
        """Poison a data set that lies in memory.

        Args:
            x: inputs ``(N, C, H, W)`` or ``(N, D)``, floating point.
            y: labels, int64 ``(N,)``.
            classes: how many classes there are, >= 2.

        Raises:
            ValueError: as in ``changes``, or x and y differ in length.
        """
        if len(x) != len(y):
            raise ValueError(f"there must be one label a row, got {len(x)} rows and {len(y)} labels")
        changed = self.changes(lambda rows: x[rows.to(x.device)], y, classes)
        if self.appends:
            added = torch.arange(len(y) + len(changed.rows)) >= len(y)
            return Poisoned(torch.cat([x, changed.x]), torch.cat([y, changed.y]), added.to(y.device))
        new_x, new_y, mask = x.clone(), y.clone(), torch.zeros_like(y, dtype=torch.bool)
        new_x[changed.rows.to(x.device)] = changed.x
        new_y[changed.rows.to(y.device)] = changed.y
        mask[changed.rows.to(y.device)] = True
        return Poisoned(new_x, new_y, mask)


def check_range(x: Tensor, low: float, high: float) -> None:
    """Refuse inputs that are not finite numbers in [low, high], give or take a rounding error.

    Raises:
        ValueError: with the range that was found.
    """
    slack = 1e-3 * (high - low)
    if x.numel() and not (x.amin() >= low - slack and x.amax() <= high + slack):
        raise ValueError(
            f"inputs must lie in [{low:g}, {high:g}], but range from {x.amin():.3g} to {x.amax():.3g}; set low and "
            "high to the range of your inputs as the poison sees them"
        )


def other_class(y: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """For each label ``(K,)`` another class, uniformly drawn."""
    return (y + torch.randint(1, classes, y.shape, generator=generator).to(y.device)) % classes


def is_number(value: object) -> bool:
    """Whether it is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_range(low: object, high: object) -> bool:
    """Whether inputs can range from one to the other, in float32."""
    return is_number(low) and is_number(high) and -1e30 < low < high < 1e30  # type: ignore[operator]


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of no more than 64 bits; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
