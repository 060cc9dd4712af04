"""Checks of settings that several attacks share."""

from __future__ import annotations

import math
from typing import Any

LARGEST = 2**63 - 1


def check_counts(attack: str, **settings: Any) -> None:
    """Refuse what is no whole number >= 1.

    Args:
        attack: the attack's name in messages.
        settings: by name.

    Raises:
        ValueError: one is something else.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise ValueError(f"{attack}.{name} must be a whole number >= 1, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether it is a finite number, truth values aside."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
