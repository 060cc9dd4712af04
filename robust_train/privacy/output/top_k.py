"""The probabilities of the likeliest classes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.privacy.output.base import OutputPerturbation


def top_k(probabilities: Tensor, k: int) -> Tensor:
    """The k largest probabilities of each row; the rest of the mass is spread evenly over the other classes.

    Args:
        probabilities: ``(B, classes)``.
        k: >= 1; at most ``classes`` are kept.

    Returns:
        Tensor of the same shape: all that somebody knows who is told the k largest.
    """
    classes = probabilities.shape[1]
    if k >= classes:
        return probabilities
    values, places = probabilities.topk(k, 1)
    rest = (1 - values.sum(1, keepdim=True)).clamp_min(0) / (classes - k)
    return torch.scatter(rest.expand_as(probabilities), 1, places, values)


@dataclass(frozen=True)
class TopK(OutputPerturbation):
    """Answer with the k likeliest classes and their probabilities.

    Args:
        k: whole number >= 1.

    Raises:
        ValueError: it is something else.

    Reference:
        Shokri et al., "Membership Inference Attacks Against Machine Learning Models", 2017, section VIII.
    """

    k: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"top_k.k must be a whole number >= 1, got {self.k!r}")

    def __call__(self, probabilities: Tensor) -> Tensor:
        return top_k(probabilities, self.k)
