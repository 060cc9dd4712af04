"""Normalisations within each example; only their weights and biases are trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.privacy.engines.base import UnsupportedLayer
from robust_train.privacy.engines.layers.base import Simple, per_channel, per_feature
from robust_train.privacy.engines.terms import Rows


class Normalization(Simple):
    """The output is the normalised input times the weight, plus the bias."""

    @abstractmethod
    def normalized(self, x: Tensor) -> Tensor:
        """The layer's output, were it not for weight and bias."""

    @abstractmethod
    def summed(self, values: Tensor, examples: int) -> Tensor:
        """Sum values of the output's shape to those of the weight's elements, shape ``(examples, elements)``."""

    def weight(self, x: Tensor, gradient: Tensor, examples: int) -> Rows:
        return Rows(self.summed(self.normalized(x) * gradient, examples))

    def bias(self, x: Tensor, gradient: Tensor, examples: int) -> Rows:
        return Rows(self.summed(gradient, examples))


class LayerNorm(Normalization):
    """``nn.LayerNorm``, on inputs ``(rows, *positions, *normalized_shape)``."""

    layer: nn.LayerNorm

    def batched(self, x: Tensor) -> bool:
        return x.dim() > len(self.layer.normalized_shape)

    def normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.layer.normalized_shape, eps=self.layer.eps)

    def summed(self, values: Tensor, examples: int) -> Tensor:
        return per_feature(values, examples, self.layer.weight.numel())


class RMSNorm(LayerNorm):
    """``nn.RMSNorm``, on inputs ``(rows, *positions, *normalized_shape)``."""

    layer: nn.RMSNorm  # pyright: ignore[reportIncompatibleVariableOverride]

    def normalized(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.layer.normalized_shape, eps=self.layer.eps)


class GroupNorm(Normalization):
    """``nn.GroupNorm``, on inputs ``(rows, channels, *positions)``."""

    layer: nn.GroupNorm

    def normalized(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.layer.num_groups, eps=self.layer.eps)

    def summed(self, values: Tensor, examples: int) -> Tensor:
        return per_channel(values, examples)


class InstanceNorm(Normalization):
    """``nn.InstanceNorm1d`` and its like, on inputs ``(rows, channels, *positions)``."""

    layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
    dimensions = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}

    def __init__(self, layer: nn.InstanceNorm1d, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(layer, trained)
        if layer.track_running_stats:
            raise UnsupportedLayer(
                "an InstanceNorm with track_running_stats=True keeps statistics of the batch, to which no noise is "
                "added; leave the setting out"
            )

    def batched(self, x: Tensor) -> bool:
        return x.dim() == self.dimensions[type(self.layer)]

    def normalized(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, eps=self.layer.eps)

    def summed(self, values: Tensor, examples: int) -> Tensor:
        return per_channel(values, examples)
