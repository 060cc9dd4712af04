"""The normalisation layers that the networks here can be built with."""

from math import gcd
from typing import Literal

from torch import nn

from ._checks import choice

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
    choice("norm", norm, ("batch", "group", "none"))
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(gcd(8, channels), channels)
    return nn.Identity()
