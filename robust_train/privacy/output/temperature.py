"""Probabilities at another temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_train.privacy.output.base import OutputPerturbation


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """The softmax of the logits divided by a temperature, from the probabilities at temperature 1.

    Args:
        probabilities: ``(B, classes)``.
        temperature: > 0; above 1 the answers are less sure.

    Returns:
        Tensor of the same shape.
    """
    return (probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / temperature).softmax(1)


@dataclass(frozen=True)
class Temperature(OutputPerturbation):
    """Make answers less sure. Every difference between records is still there for who knows the temperature.

    Args:
        temperature: number > 0.

    Raises:
        ValueError: it is something else.

    Reference:
        Shokri et al., "Membership Inference Attacks Against Machine Learning Models", 2017, section VIII.
    """

    temperature: float = 5.0

    def __post_init__(self) -> None:
        value: Any = self.temperature
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"temperature.temperature must be a number > 0, got {value!r}")

    def __call__(self, probabilities: Tensor) -> Tensor:
        return tempered(probabilities, self.temperature)
