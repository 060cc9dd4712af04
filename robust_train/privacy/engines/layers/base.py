"""What a rule is: how the layers of one family are recorded, and what their records say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robust_train.privacy.engines.base import RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.tape import Record, Tape, constants, tap
from robust_train.privacy.engines.terms import Term


@dataclass(frozen=True)
class Addition:
    """What a record adds to the gradients of a parameter.

    Attributes:
        parameter: name within the layer.
        term: the addition, for each example.
    """

    parameter: str
    term: Term


class Rule(ABC):
    """Per-example gradients of one layer.

    Args:
        layer: the layer.
        trained: its parameters whose gradients are wanted, by their names within it.

    Raises:
        UnsupportedLayer: settings of the layer mix examples, or change its parameters by other means than gradients.
    """

    method: str | None = None  # how it tells gradients, where its terms do not say so

    def __init__(self, layer: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self.layer, self.trained = layer, dict(trained)

    @abstractmethod
    def forward(self, tape: Tape, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, bit for bit, recorded on ``tape``."""

    @abstractmethod
    def rows(self, record: Record) -> int:
        """How many rows of the batch a record has."""

    @abstractmethod
    def additions(self, record: Record, examples: int) -> Iterator[Addition]:
        """What a record adds to the parameters' gradients.

        Args:
            record: with floating point values in the type to compute in.
            examples: each of as many consecutive rows as the record's rows are a multiple of it; their gradients
                are summed.
        """


class Simple(Rule):
    """A layer with one input and at most a ``weight`` and a ``bias``, rows on the first dimension throughout."""

    def __init__(self, layer: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(layer, trained)
        if others := set(trained) - {"weight", "bias"}:
            raise UnsupportedLayer(
                f"hooks compute the layer's weights from {', '.join(sorted(others))}; use "
                "torch.nn.utils.parametrizations, which does so in sight"
            )

    def forward(self, tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if not self.batched(x):
            raise RowsMismatch(f"{type(self.layer).__name__} got one example, {tuple(x.shape)}, in place of a batch")
        with constants(self.trained.values()):
            output = self.stock(*args, **kwargs)
        return tap(output, (x,), tape.writer(self), self.trained.values())

    def rows(self, record: Record) -> int:
        return len(record.gradient)

    def additions(self, record: Record, examples: int) -> Iterator[Addition]:
        for name in self.trained:
            tell = self.weight if name == "weight" else self.bias
            yield Addition(name, tell(record.inputs[0], record.gradient, examples))

    def stock(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward."""
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def batched(self, x: Tensor) -> bool:
        """Whether the first dimension of an input is the batch's."""
        return x.dim() > 1

    @abstractmethod
    def weight(self, x: Tensor, gradient: Tensor, examples: int) -> Term:
        """Gradient of the weight."""

    @abstractmethod
    def bias(self, x: Tensor, gradient: Tensor, examples: int) -> Term:
        """Gradient of the bias."""


def per_channel(values: Tensor, examples: int) -> Tensor:
    """Sum ``(rows, channels, *positions)`` to ``(examples, channels)``."""
    return values.reshape(examples, -1, values.shape[1], values[0, 0].numel()).sum((1, 3))


def per_feature(values: Tensor, examples: int, features: int) -> Tensor:
    """Sum ``(rows, *positions, *features)`` to ``(examples, features)``."""
    return values.reshape(examples, -1, features).sum(1)
