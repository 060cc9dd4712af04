"""What is done with suspicious rows, and how far that may go."""

from __future__ import annotations

from dataclasses import dataclass

ACTIONS = ("quarantine", "drop", "downweight")


@dataclass(frozen=True)
class Policy:
    """What is done with suspicious rows, and how far that may go.

    Args:
        action: ``"quarantine"``: left out of training and listed, so that they can be looked at and restored;
            ``"drop"``: left out; ``"downweight"``: drawn less often.
        target_fpr: expected share of clean rows that each filter may flag; of several filters the shares add up.
        min_power: share of the canaries that a filter must find for its verdict to count.
        max_drop: largest share of all rows that may be touched. What goes beyond it is kept, the least suspicious
            first, and the report says so: a larger value is your explicit consent.
        max_drop_per_class: the same of each class.
        weight: how often a down-weighted row is drawn, relative to the others.

    Raises:
        ValueError: a setting is out of range.
    """

    action: str = "quarantine"
    target_fpr: float = 0.01
    min_power: float = 0.3
    max_drop: float = 0.3
    max_drop_per_class: float = 0.5
    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"policy.action must be one of {', '.join(ACTIONS)}, got {self.action!r}")
        for name in ("target_fpr", "min_power", "max_drop", "max_drop_per_class", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ValueError(f"policy.{name} must be in (0, 1], got {value!r}")
