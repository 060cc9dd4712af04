"""What an output perturbation is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class OutputPerturbation(ABC):
    """Changes the probabilities that a classifier answers with; its weights stay as they are.

    To add one, write a file with a pure function and a frozen dataclass that implements ``__call__``, and a yaml of the
    same name in ``conf/output/``.

    Guarantees:
        Rows that are probabilities become rows that are probabilities: at least 0, of sum 1.

    Note:
        Such a defence hides little (Aerni et al. 2024): the membership audit measures with it and without it.
    """

    @abstractmethod
    def __call__(self, probabilities: Tensor) -> Tensor:
        """What is answered instead.

        Args:
            probabilities: ``(B, classes)``.

        Returns:
            Tensor of the same shape.
        """


class PerturbedOutputs(nn.Module):
    """A classifier for inference that answers with perturbed probabilities.

    Args:
        model: maps inputs to logits ``(B, classes)``.
        perturbation: what is answered instead of their softmax.

    Example::

        served = PerturbedOutputs(module, LabelOnly()).eval()
        served(x)  # probabilities (B, classes)
    """

    def __init__(self, model: nn.Module, perturbation: OutputPerturbation) -> None:
        super().__init__()
        if not isinstance(perturbation, OutputPerturbation):
            raise TypeError(f"perturbation must be a robust_train OutputPerturbation, got {perturbation!r}")
        self.model, self.perturbation = model, perturbation

    def forward(self, x: Tensor) -> Tensor:
        return self.perturbation(self.model(x).softmax(1))
