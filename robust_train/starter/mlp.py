"""A multilayer perceptron."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from ._checks import number, whole, wholes


class MLP(nn.Module):
    """Fully connected layers with ReLU and dropout between them.

    Args:
        shape: shape of one example.
        classes: how many logits to return.
        hidden: widths of the hidden layers; none makes the model linear.
        dropout: probability of zeroing a hidden unit.

    Raises:
        ValueError: a setting is out of range.

    Shapes:
        ``x: (B, *shape)``, returns ``(B, classes)``.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 8, 8),
        classes: int = 10,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        wholes("shape", shape)
        whole("classes", classes, 1, 2**20)
        wholes("hidden", hidden)
        number("dropout", dropout, "in [0, 1)", 0, 1)
        layers: list[nn.Module] = [nn.Flatten()]
        width = prod(shape)
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.layers = nn.Sequential(*layers, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
