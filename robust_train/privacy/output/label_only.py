"""The predicted class and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import one_hot

from robust_train.privacy.output.base import OutputPerturbation


def label_only(probabilities: Tensor) -> Tensor:
    """Probability 1 for the likeliest class of each row ``(B, classes)``."""
    return one_hot(probabilities.argmax(1), probabilities.shape[1]).to(probabilities.dtype)


@dataclass(frozen=True)
class LabelOnly(OutputPerturbation):
    """Answer with the class alone.

    Note:
        The audit asks once for each record. Who may ask often finds the distance to the decision boundary, which says
        nearly as much as the probabilities (Choquette-Choo et al. 2021).
    """

    def __call__(self, probabilities: Tensor) -> Tensor:
        return label_only(probabilities)
