"""Attention: linear projections before and behind it, those before it stacked in one parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import opacus.layers.dp_multihead_attention as opacus
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.privacy.engines.base import RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.layers.base import Addition, Rule, per_feature
from robust_train.privacy.engines.layers.linear import linear
from robust_train.privacy.engines.tape import Record, Tape, constants, tap
from robust_train.privacy.engines.terms import Outer, Rows

PARAMETERS = {f"{name}_weight" for name in ("in_proj", "q_proj", "k_proj", "v_proj")} | {
    "in_proj_bias",
    "out_proj.weight",
    "out_proj.bias",
}


@dataclass(frozen=True)
class Projection:
    """A linear map by some rows of a weight and elements of a bias.

    Attributes:
        weight: name of the weight.
        weight_rows: those of its rows.
        bias: name of the bias.
        bias_rows: those of its elements.
        batch: rows of the batch; the inputs have positions first, then these.
    """

    weight: str
    weight_rows: slice
    bias: str
    bias_rows: slice
    batch: int


class MultiheadAttention(Rule):
    """``nn.MultiheadAttention``; rows on the first dimension if ``batch_first``, else on the second."""

    layer: nn.MultiheadAttention

    def __init__(self, layer: nn.MultiheadAttention, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(layer, trained)
        if layer.bias_k is not None or layer.add_zero_attn:
            raise UnsupportedLayer("nn.MultiheadAttention(add_bias_kv or add_zero_attn) has no rule; leave these out")
        if others := set(trained) - PARAMETERS:
            raise UnsupportedLayer(
                f"nn.MultiheadAttention computes with {', '.join(sorted(others))}, put in from outside"
            )

    def forward(
        self,
        tape: Tape,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        layer = self.layer
        if query.dim() != 3:
            raise RowsMismatch(f"nn.MultiheadAttention got one example, {tuple(query.shape)}, in place of a batch")
        if is_causal and attn_mask is None:
            raise ValueError("nn.MultiheadAttention(is_causal=True) needs attn_mask")
        same = key is value, query is key and key is value
        if layer.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        targets, batch, width = query.shape
        q, k, v = self._project_in(tape, query, key, value, *same)
        q, k, v = (x.reshape(len(x), batch * layer.num_heads, -1).transpose(0, 1) for x in (q, k, v))
        mask = _mask(attn_mask, key_padding_mask, layer.num_heads, q.dtype)
        dropout, weights = layer.dropout if layer.training else 0.0, None
        if need_weights:
            q = q * math.sqrt(1 / q.shape[-1])
            scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
            weights = F.softmax(scores, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = torch.bmm(weights, v).transpose(0, 1)
            weights = weights.view(batch, layer.num_heads, targets, -1)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            q, k, v = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
            if is_causal and key_padding_mask is None:
                attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            else:
                if mask is not None:
                    mask = mask[None] if len(mask) == 1 else mask.unflatten(0, (batch, -1))
                attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
            attended = attended.permute(2, 0, 1, 3)
        attended = attended.reshape(targets * batch, width)
        everything = slice(None)
        behind = Projection("out_proj.weight", everything, "out_proj.bias", everything, batch)
        output = self._project(tape, attended, behind).view(targets, batch, -1)
        return (output.transpose(0, 1) if layer.batch_first else output), weights

    def _project_in(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, key_is_value: bool, all_same: bool
    ) -> list[Tensor]:
        """In as many products as the layer's own forward makes, so that the results are the same bit for bit."""
        width, batch = self.layer.embed_dim, query.shape[1]
        thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
        if self.layer.in_proj_weight is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return [
                self._project(tape, x, Projection(name, slice(None), "in_proj_bias", third, batch))
                for x, name, third in zip((query, key, value), names, thirds, strict=True)
            ]

        def packed(x: Tensor, first: int, last: int) -> list[Tensor]:
            rows = slice(first * width, last * width)
            together = self._project(tape, x, Projection("in_proj_weight", rows, "in_proj_bias", rows, batch))
            return [part.contiguous() for part in together.split(width, -1)]

        if all_same:
            return packed(query, 0, 3)
        if key_is_value:
            return packed(query, 0, 1) + packed(key, 1, 3)
        return packed(query, 0, 1) + packed(key, 1, 2) + packed(value, 2, 3)

    def _project(self, tape: Tape, x: Tensor, projection: Projection) -> Tensor:
        layer = self.layer
        weight = layer.get_parameter(projection.weight)
        bias = layer.out_proj.bias if projection.bias == "out_proj.bias" else layer.in_proj_bias
        mine = [p for p in self.trained.values() if p is weight or p is bias]
        with constants(mine):
            output = linear(x, weight[projection.weight_rows], None if bias is None else bias[projection.bias_rows])
        return tap(output, (x,), tape.writer(self, projection), mine) if mine else output

    def rows(self, record: Record) -> int:
        return record.part.batch

    def additions(self, record: Record, examples: int) -> Iterator[Addition]:
        projection: Projection = record.part
        # (positions, rows, features), some of them flattened -> (rows, positions, features)
        x, gradient = (
            tensor.reshape(-1, projection.batch, tensor.shape[-1]).transpose(0, 1)
            for tensor in (*record.inputs, record.gradient)
        )
        if (weight := self.trained.get(projection.weight)) is not None:
            left = _placed(gradient, projection.weight_rows, len(weight)).reshape(examples, 1, -1, len(weight))
            yield Addition(projection.weight, Outer(left, x.reshape(examples, 1, -1, x.shape[-1])))
        if (bias := self.trained.get(projection.bias)) is not None:
            sums = per_feature(gradient, examples, gradient.shape[-1])
            yield Addition(projection.bias, Rows(_placed(sums, projection.bias_rows, len(bias))))


class SequenceBias(Rule):
    """Opacus' ``SequenceBias``, of its attention: one more position behind the last, the same for all rows."""

    layer: opacus.SequenceBias

    def forward(self, tape: Tape, x: Tensor) -> Tensor:
        with constants(self.trained.values()):
            output = type(self.layer).forward(self.layer, x)
        return tap(output, (), tape.writer(self), self.trained.values())

    def rows(self, record: Record) -> int:
        return record.gradient.shape[0 if self.layer.batch_first else 1]

    def additions(self, record: Record, examples: int) -> Iterator[Addition]:
        last = record.gradient.select(1 if self.layer.batch_first else 0, -1)
        yield Addition("bias", Rows(per_feature(last, examples, last.shape[-1])))


def _placed(gradient: Tensor, rows: slice, length: int) -> Tensor:
    """The gradient of all ``length`` rows, zeros but for ``rows``, on the last dimension."""
    first, last, _ = rows.indices(length)
    return gradient if last - first == length else F.pad(gradient, (first, length - last))


def _mask(attention: Tensor | None, padding: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores: of shape ``(1, targets, sources)`` or ``(rows * heads, 1 or targets, sources)``."""
    masks = []
    if attention is not None:
        masks.append(attention if attention.dim() == 3 else attention[None])
    if padding is not None:
        masks.append(padding.repeat_interleave(heads, 0)[:, None])
    for i, mask in enumerate(masks):
        if mask.dtype == torch.bool:
            masks[i] = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return masks[0] + masks[1] if len(masks) == 2 else masks[0] if masks else None
