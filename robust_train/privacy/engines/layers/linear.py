"""Linear layers and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.privacy.engines.base import RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.layers.base import Simple, per_feature
from robust_train.privacy.engines.tape import Tape
from robust_train.privacy.engines.terms import Lookup, Outer, Rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, in whose last bits nothing tells that the weights are seen as constants.

    With inputs that are not contiguous, torch takes another way if no weight requires a gradient.
    """
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    output = F.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return output if bias is None else output.add_(bias.to(output.dtype))


class Linear(Simple):
    """``nn.Linear``, on inputs ``(rows, *positions, features)``."""

    layer: nn.Linear

    def stock(self, input: Tensor) -> Tensor:
        return linear(input, self.layer.weight, self.layer.bias)

    def weight(self, x: Tensor, gradient: Tensor, examples: int) -> Outer:
        left = gradient.reshape(examples, 1, -1, gradient.shape[-1])
        return Outer(left, x.reshape(examples, 1, -1, x.shape[-1]))

    def bias(self, x: Tensor, gradient: Tensor, examples: int) -> Rows:
        return Rows(per_feature(gradient, examples, gradient.shape[-1]))


class RecurrentLinear(Linear):
    """Opacus' ``RNNLinear``, of its recurrent layers, which call it once for each time step."""

    def forward(self, tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
        refuse_packed(self.layer)
        return super().forward(tape, *args, **kwargs)


def refuse_packed(layer: nn.Linear) -> None:
    """Raise if packed sequences came, which sort the batch: rows would not be those of other layers.

    Raises:
        RowsMismatch: they did, at some time.
    """
    if "max_batch_len" in layer.__dict__:  # Opacus' note to itself for that case
        raise RowsMismatch(
            "packed sequences change the order of the batch, and its rows from step to step; pad the sequences, and "
            "mask the outputs"
        )


class Embedding(Simple):
    """``nn.Embedding``, on ids ``(rows, *positions)``."""

    layer: nn.Embedding

    def __init__(self, layer: nn.Embedding, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(layer, trained)
        for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
            if layer.__dict__[setting]:
                raise UnsupportedLayer(
                    f"nn.Embedding({setting}=...) changes its rows or their gradients by what the batch looks up; "
                    "leave it out"
                )

    def batched(self, x: Tensor) -> bool:
        return x.dim() > 0

    def weight(self, x: Tensor, gradient: Tensor, examples: int) -> Lookup:
        ids, added = x.reshape(examples, -1).long(), gradient.reshape(examples, -1, gradient.shape[-1])
        if self.layer.padding_idx is not None:
            added = added.masked_fill((ids == self.layer.padding_idx)[..., None], 0)
        return Lookup(ids, added, self.layer.num_embeddings)

    def bias(self, x: Tensor, gradient: Tensor, examples: int) -> Rows:
        raise AssertionError("an embedding has no bias")
