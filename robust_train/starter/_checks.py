"""Checks that several classes here share."""

import math
from collections.abc import Sequence
from typing import Any

LARGEST = 2**31 - 1  # of a count; torch has no name for more, and no machine the memory


def whole(name: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Refuse what is not a whole number from ``least`` to ``most``.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number >= {least}{_limit(value, most)}, got {value!r}")


def number(name: str, value: Any, wanted: str, low: float, high: float = math.inf, *, with_low: bool = True) -> None:
    """Refuse what is not a number in ``[low, high)``, or in ``(low, high)``.

    Raises:
        ValueError: it is not; ``wanted`` says in words what it must be.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if value == low and not with_low:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def wholes(name: str, values: Any, length: int | None = None, *, most: int = 2**20) -> None:
    """Refuse what is not a list of whole numbers from 1 to ``most``.

    Raises:
        ValueError: it is not, or has not ``length`` of them.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or (length is not None and len(values) != length):
        amount = "whole numbers" if length is None else f"{length} whole numbers"
        raise ValueError(f"{name} must be a list of {amount} >= 1, got {values!r}")
    for index, value in enumerate(values):
        whole(f"{name}[{index}]", value, 1, most)


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")


def _limit(value: Any, most: int) -> str:
    """The upper limit, for whoever went beyond it."""
    return f" and <= {most}" if isinstance(value, int) and value > most else ""
