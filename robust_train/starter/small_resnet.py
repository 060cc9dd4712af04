"""A small residual network."""

from collections.abc import Sequence

from torch import Tensor, nn

from ._checks import whole
from .norm import Norm, norm_layer


class SmallResNet(nn.Module):
    """A residual network with one stage for each entry of ``blocks``; each stage is twice as wide and half as large.

    Args:
        in_channels: channels of the images.
        classes: how many logits to return.
        width: channels of the first stage.
        blocks: residual blocks in each stage.
        norm: ``"group"``, ``"batch"`` or ``"none"``.

    Raises:
        ValueError: a setting is out of range.

    Shapes:
        ``x: (B, in_channels, H, W)`` of any size, returns ``(B, classes)``.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", 2016.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1),
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        whole("in_channels", in_channels, 1, 2**20)
        whole("classes", classes, 1, 2**20)
        whole("width", width, 1, 2**20)
        if not blocks or not isinstance(blocks, Sequence) or not all(_count(n) for n in blocks) or len(blocks) > 16:
            raise ValueError(f"blocks must name at least one block for each of up to 16 stages, got {blocks!r}")
        layers: list[nn.Module] = [_convolution(in_channels, width, 1), norm_layer(norm, width), nn.ReLU()]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                wider, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(channels, wider, stride, norm))
                channels = wider
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(-2, -1)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        inputs: channels that arrive.
        outputs: channels that leave.
        stride: 1 keeps the resolution, 2 halves it.
        norm: as in :class:`SmallResNet`.

    Shapes:
        ``x: (B, inputs, H, W)``, returns ``(B, outputs, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, stride),
            norm_layer(norm, outputs),
            nn.ReLU(),
            _convolution(outputs, outputs, 1),
            norm_layer(norm, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), norm_layer(norm, outputs)
            )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1024


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
