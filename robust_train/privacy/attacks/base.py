"""What a membership inference attack is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from robust_train.privacy.membership import Signals


class MembershipAttack(ABC):
    """Settings of an attack; calling it scores examples.

    To add one, write a file with a pure function and a frozen dataclass that implements ``__call__``, and a yaml of the
    same name in ``conf/inference/``.

    Guarantees:
        The scores depend on the signals alone. Members score higher. Nothing tells the attack who is a member of the
        audited model.
    """

    @property
    def references(self) -> int:
        """How many reference models it needs at least."""
        return 0

    @abstractmethod
    def __call__(self, signals: Signals) -> np.ndarray:
        """Scores of N examples.

        Args:
            signals: what the attacker holds.

        Returns:
            float64 ``(N,)``, higher for members; NaN for an example about which the references say nothing.

        Raises:
            ValueError: there are too few references.
        """

    def check(self, signals: Signals) -> None:
        """Refuse too few references.

        Raises:
            ValueError: the message says how many it takes.
        """
        if signals.count < self.references:
            raise ValueError(
                f"{type(self).__name__} needs at least {self.references} reference model(s), got {signals.count}"
            )
