"""Convolutions and their transposes, in one to three dimensions."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.privacy.engines.layers.base import Simple, per_channel
from robust_train.privacy.engines.terms import Outer, Rows, Term, ghost


class Windowed(Simple):
    """The weight's gradient pairs each position of ``steps`` with the window of ``field`` that it belongs to."""

    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

    def batched(self, x: Tensor) -> bool:
        return x.dim() == self.layer.weight.dim()

    def bias(self, x: Tensor, gradient: Tensor, examples: int) -> Rows:
        return Rows(per_channel(gradient, examples))

    @abstractmethod
    def roles(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """``steps`` of shape ``(rows, weight.shape[0], *positions)``, and the padded ``field``."""

    def weight(self, x: Tensor, gradient: Tensor, examples: int) -> Term:
        layer = self.layer
        steps, field = self.roles(x, gradient)
        for axis, (kernel, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):  # what no window reaches is cut off
            field = field.narrow(axis, 0, (steps.shape[axis] - 1) * stride + dilation * (kernel - 1) + 1)
        views = len(steps) // examples
        positions, outputs = steps[0, 0].numel() * views, len(layer.weight) // layer.groups
        if ghost(positions, outputs, layer.weight[0].numel()):
            return self._outer(steps, field, examples)
        if x.is_cuda:  # where convolutions of many groups are slow
            return self._outer(steps, field, examples).written_out()
        return self._rows(steps, field, examples)

    def _outer(self, steps: Tensor, field: Tensor, examples: int) -> Outer:
        """With all windows of the field written out."""
        layer, spatial = self.layer, steps.dim() - 2
        for axis, (kernel, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):
            field = field.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        rows, channels = len(field), field.shape[1]
        windows = field.unflatten(1, (layer.groups, channels // layer.groups))
        # (rows, groups, channels, *positions, *kernel) -> (rows, groups, *positions, channels, *kernel)
        windows = windows.movedim(2, 2 + spatial).reshape(rows, layer.groups, steps[0, 0].numel(), -1)
        left = steps.flatten(2).unflatten(1, (layer.groups, -1)).mT
        return Outer(_merged(left, examples), _merged(windows, examples))

    def _rows(self, steps: Tensor, field: Tensor, examples: int) -> Rows:
        """As the weight gradient of one convolution with a group for each example and group; no window is written."""
        layer = self.layer
        views = len(steps) // examples
        # Views take the place of the batch, and examples that of channels.
        steps = steps.unflatten(0, (examples, views)).transpose(0, 1).flatten(1, 2)
        field = field.unflatten(0, (examples, views)).transpose(0, 1).flatten(1, 2)
        weight = steps.new_empty(()).expand(examples * len(layer.weight), *layer.weight.shape[1:])
        spatial = steps.dim() - 2
        _, gradient, _ = torch.ops.aten.convolution_backward(
            steps, field, weight, None, layer.stride, [0] * spatial, layer.dilation, False,
            [0] * spatial, examples * layer.groups, [False, True, False],
        )  # fmt: skip
        return Rows(gradient.reshape(examples, -1))


def _merged(values: Tensor, examples: int) -> Tensor:
    """Put an example's positions together: ``(rows, groups, T, ...)`` to ``(examples, groups, views * T, ...)``."""
    if len(values) == examples:
        return values
    return values.unflatten(0, (examples, -1)).transpose(1, 2).flatten(2, 3)


class Convolution(Windowed):
    """``nn.Conv1d`` and its like: windows of the input, at each position of the output."""

    def roles(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        if layer.padding == "valid":
            return gradient, x
        margins = []
        for axis, (kernel, dilation) in reversed(list(enumerate(zip(layer.kernel_size, layer.dilation, strict=True)))):
            if layer.padding == "same":
                both = dilation * (kernel - 1)
                margins += [both // 2, both - both // 2]
            else:
                margins += [int(layer.padding[axis])] * 2
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return gradient, F.pad(x, margins, mode) if any(margins) else x


class TransposedConvolution(Windowed):
    """``nn.ConvTranspose1d`` and its like: windows of the output's gradient, at each position of the input."""

    def roles(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return x, F.pad(gradient, [int(margin) for side in reversed(self.layer.padding) for margin in (side, side)])
