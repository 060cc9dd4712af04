"""What a defence seems to bring beside what it brings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gain:
    """What a defence seems to bring and what it brings: robust accuracies on the same examples, 0 to 1.

    Attributes:
        undefended: of the model without the defence.
        apparent: with it, against an attack that does not know of it.
        adaptive: with it, against one that does. Only this number says anything about the defence.
        n: examples.
    """

    undefended: float
    apparent: float
    adaptive: float
    n: int

    @property
    def apparent_gain(self) -> float:
        return self.apparent - self.undefended

    @property
    def adaptive_gain(self) -> float:
        return self.adaptive - self.undefended

    def __str__(self) -> str:
        return (
            f"undefended {self.undefended:.1%}, apparent {self.apparent:.1%} ({self.apparent_gain:+.1%}), "
            f"adaptive {self.adaptive:.1%} ({self.adaptive_gain:+.1%})"
        )
