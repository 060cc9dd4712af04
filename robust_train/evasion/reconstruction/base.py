"""What every input reconstruction has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust_train.evasion.attacks._checks import is_number


class Reconstruction(nn.Module, ABC):
    """A step before a model, in pixels, that keeps the shape of what it is given.

    Attributes:
        random: whether it draws anew in each pass; the adaptive attack then averages over draws.
    """

    random: ClassVar[bool] | bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Reconstructed inputs of ``x``'s shape, in pixels."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def learning_loss(self, x: Tensor, generator: torch.Generator) -> Tensor | None:
        """What is minimised to fit it to clean inputs, a scalar; None where there is nothing to learn.

        Args:
            x: clean inputs ``(B, ...)`` in pixels.
            generator: source of all randomness.
        """
        return None


def check_range(name: str, low: float, high: float) -> None:
    """Refuse ends of a range that are none.

    Raises:
        ValueError: ``low`` is not below ``high``, or one is no finite number.
    """
    if not (is_number(low) and is_number(high)) or not low < high:
        raise ValueError(f"{name}.low must be below {name}.high, both finite, got {low!r} and {high!r}")


def check_images(name: str, x: Tensor) -> None:
    """Refuse what is no batch of images.

    Raises:
        ValueError: ``x`` is not ``(B, C, H, W)``.
    """
    if x.ndim != 4:
        raise ValueError(f"{name} is for images (B, C, H, W), got an input {tuple(x.shape)}")
