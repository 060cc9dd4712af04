"""A small convolutional network for images from 8 by 8 pixels up."""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ._checks import number, whole
from .norm import Norm, norm_layer


class SmallCNN(nn.Module):
    """Four 3x3 convolutions in two blocks, the second at half the resolution, then one linear layer.

    Args:
        in_channels: channels of the images.
        classes: how many logits to return.
        channels: width of the first block; the second is twice as wide.
        dropout: probability of zeroing a feature before the linear layer.
        norm: ``"batch"``, ``"group"`` or ``"none"``, after each convolution.

    Raises:
        ValueError: a setting is out of range.

    Shapes:
        ``x: (B, in_channels, H, W)`` with ``H, W >= 8``, returns ``(B, classes)``.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        channels: int = 32,
        dropout: float = 0.25,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        whole("in_channels", in_channels, 1, 2**20)
        whole("classes", classes, 1, 2**20)
        whole("channels", channels, 1, 2**20)
        number("dropout", dropout, "in [0, 1)", 0, 1)
        self.features = nn.Sequential(
            *_convolution(in_channels, channels, norm),
            *_convolution(channels, channels, norm),
            nn.MaxPool2d(2),
            *_convolution(channels, 2 * channels, norm),
            *_convolution(2 * channels, 2 * channels, norm),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * channels * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(_pool(self.features(x), 4).flatten(1)))


def _convolution(inputs: int, outputs: int, norm: Norm) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=norm == "none")
    return conv, norm_layer(norm, outputs), nn.ReLU()


def _pool(x: Tensor, size: int) -> Tensor:
    """Average to ``size`` by ``size``, as adaptive pooling does, whose backward pass is not deterministic on a GPU."""
    stride = (x.shape[-2] // size, x.shape[-1] // size)
    kernel = (x.shape[-2] - (size - 1) * stride[0], x.shape[-1] - (size - 1) * stride[1])
    return avg_pool2d(x, kernel, stride)
