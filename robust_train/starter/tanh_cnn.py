"""A small convolutional network with bounded activations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import whole, wholes


class TanhCNN(nn.Module):
    """Two convolutions and two linear layers with tanh between them, 26,010 weights for 28 by 28 grey pixels.

    Bounded activations keep the gradients of single examples small, so that clipping them for privacy costs less.

    Images from 20 pixels a side up are convolved with kernels of 8 and 4 pixels, two pixels apart; there would
    be nothing left of smaller ones, which get kernels of 4 and 3 pixels at every position.

    Args:
        shape: shape ``(C, H, W)`` of an image.
        classes: how many logits to return.
        channels: widths of the two convolutions.
        hidden: width of the hidden linear layer.

    Raises:
        ValueError: a setting is out of range.

    Shapes:
        ``x: (B, C, H, W)`` with ``H, W >= 4``, returns ``(B, classes)``.

    References:
        Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential Privacy", 2021; in this form
        Tramèr and Boneh, "Differentially Private Learning Needs Better Features (or Much More Data)", 2021.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
        channels: tuple[int, int] = (16, 32),
        hidden: int = 32,
    ) -> None:
        super().__init__()
        wholes("shape", shape, 3)
        whole("classes", classes, 1, 2**20)
        wholes("channels", channels, 2)
        whole("hidden", hidden, 1, 2**20)
        first, second, stride = (8, 4, 2) if min(shape[1:]) >= 20 else (4, 3, 1)
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], channels[0], first, stride, padding=2),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Conv2d(channels[0], channels[1], second, stride),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Flatten(),
        )
        with torch.no_grad():
            width = self.features(torch.zeros(1, *shape)).shape[1]
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(3 * x - 1))
