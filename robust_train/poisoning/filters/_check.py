"""Checks that several filters share."""

from __future__ import annotations

import math

from torch import Tensor


def whole(name: str, value: object, low: int = 1) -> None:
    """Refuse what is not a whole number >= ``low``.

    Raises:
        ValueError: it is not; ``name`` says where it was set.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
        raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")


def number(name: str, value: object, above: float, below: float = math.inf) -> None:
    """Refuse what is not a number in the open interval ``(above, below)``.

    Raises:
        ValueError: it is not; ``name`` says where it was set.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
        limit = f" and < {below:g}" if math.isfinite(below) else " and finite"
        raise ValueError(f"{name} must be a number > {above:g}{limit}, got {value!r}")


def given(name: str, part: Tensor | None) -> Tensor:
    """The part of ``Rows`` that a filter reads.

    Raises:
        ValueError: it is not there.
    """
    if part is None:
        raise ValueError(f"rows.{name} is needed here and was not gathered")
    return part
