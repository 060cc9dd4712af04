"""How a filter gets to see what a model makes of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

STEPS = 700  # optimizer steps that a probe is given where its number of epochs is not
FEWEST, MOST = 3, 20
CANARIES = (0.03, 50, 2000)  # share, and fewest and most rows


@dataclass(frozen=True)
class Probe:
    """A copy of the user's module, trained for a few epochs on the user's data.

    Args:
        epochs: how long; None: about ``STEPS`` optimizer steps, in 3 to 20 epochs.
        checkpoint: a file whose weights the copy takes instead of being trained. There are no training dynamics then.
        extractor: maps inputs to features ``(B, D)``, for example a network trained elsewhere; None: what the module's
            last layer is given.
        canaries: share of the rows that bear a wrong label while the probe is trained; None: 3 %, between 50 and 2,000
            rows. Thresholds are calibrated with them.
        seed: of everything that is drawn.

    Raises:
        ValueError: a setting is out of range.
        TypeError: ``extractor`` is no module.
    """

    epochs: int | None = None
    checkpoint: str | None = None
    extractor: nn.Module | None = None
    canaries: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "epochs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise ValueError(f"probe.{name} must be a whole number >= {least}, got {value!r}")
        if self.extractor is not None and not isinstance(self.extractor, nn.Module):
            raise TypeError(f"probe.extractor must be a torch module, got {self.extractor!r}")
        if self.checkpoint is not None and (not isinstance(self.checkpoint, str) or not self.checkpoint):
            raise ValueError(f"probe.checkpoint must be the path of a file, or null, got {self.checkpoint!r}")
        if self.checkpoint is not None and self.epochs is not None:
            raise ValueError("probe.epochs must be left out with probe.checkpoint, whose weights are not trained on")
        number = isinstance(self.canaries, (int, float)) and not isinstance(self.canaries, bool)
        if self.canaries is not None and (not number or not 0 < self.canaries <= 0.2):
            raise ValueError(f"probe.canaries must be a share in (0, 0.2], got {self.canaries!r}")

    def epochs_for(self, batches: int) -> int:
        """How many epochs of so many batches."""
        return self.epochs or min(MOST, max(FEWEST, math.ceil(STEPS / max(batches, 1))))

    def canaries_for(self, size: int) -> int:
        """How many of ``size`` rows bear a wrong label; at most a fifth of them."""
        share, fewest, most = CANARIES
        count = round(self.canaries * size) if self.canaries else min(most, max(fewest, round(share * size)))
        return min(count, size // 5)
