"""The normalisation layers that the networks here can be built with."""

from math import gcd
from typing import Literal

from torch import nn

Norm = Literal["batch", "group", "none"]


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """A layer that normalises ``(B, channels, H, W)``.

    Args:
        norm: ``"batch"``; ``"group"``, which never mixes examples, as training with per-example gradients requires (up
            to 8 groups); or ``"none"``.
        channels: how many channels arrive.

    Raises:
        ValueError: ``norm`` is none of the three.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(gcd(8, channels), channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm must be batch, group or none, got {norm!r}")
