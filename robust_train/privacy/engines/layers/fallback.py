"""Layers without a rule of ours: by a grad sampler registered with Opacus, or run again for each example."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from robust_train.privacy.engines.base import UnsupportedLayer
from robust_train.privacy.engines.layers.base import Addition, Rule
from robust_train.privacy.engines.tape import Record, Tape, constants, tap
from robust_train.privacy.engines.terms import Rows, added_up, wide


class Fallback(Rule):
    """Any layer whose output's rows each depend on the same row of its inputs alone.

    Its parameters may be computed from others (``torch.nn.utils.parametrize``), and it may have children, unless
    those own parameters that are trained.
    """

    def __init__(self, layer: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(layer, trained)
        self.sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(layer))
        self.method = "opacus" if self.sampler else "vmap"
        refuse(layer, trained)

    def forward(self, tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
        kind = type(self.layer).__name__
        inputs = (*args, *kwargs.values())
        if not all(isinstance(x, Tensor) and x.dim() for x in inputs):
            raise UnsupportedLayer(f"{kind} has no rule, and takes arguments that are no batches of tensors")
        with constants(self.trained.values()):
            output = type(self.layer).forward(self.layer, *args, **kwargs)
        if not isinstance(output, Tensor):
            raise UnsupportedLayer(f"{kind} has no rule, and returns something else than one tensor")
        # A copy: the output may be a view, or be kept by what computed it, neither of which bears an in-place change.
        return tap(output.clone(), inputs, tape.writer(self, tuple(kwargs)), self.trained.values())

    def rows(self, record: Record) -> int:
        rows = len(record.gradient)
        return rows if all(len(x) == rows for x in record.inputs) else -1

    def additions(self, record: Record, examples: int) -> Iterator[Addition]:
        rows = self._sampled(record) if self.sampler else self._mapped(record)
        for name, values in rows.items():
            yield Addition(name, Rows(added_up(values, examples)))

    def _sampled(self, record: Record) -> dict[str, Tensor]:
        assert self.sampler is not None  # noqa: S101
        rows = self.sampler(self.layer, list(record.inputs), record.gradient)
        return {name: rows[p] for name, p in self.trained.items()}

    def _mapped(self, record: Record) -> dict[str, Tensor]:
        stock, names = _Stock(self.layer), record.part
        values = {f"layer.{name}": wide(p) for name, p in self.trained.items()}
        state = {name: wide(value) for name, value in (*stock.named_parameters(), *stock.named_buffers())}

        def loss(values: dict[str, Tensor], gradient: Tensor, *inputs: Tensor) -> Tensor:
            one = [x[None] for x in inputs]
            args, kwargs = one[: len(one) - len(names)], one[len(one) - len(names) :]
            output = torch.func.functional_call(
                stock, state | values, tuple(args), dict(zip(names, kwargs, strict=True))
            )
            return (output * gradient[None]).sum()

        dims = (None, *[0] * (1 + len(record.inputs)))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # vmap loops instead
                rows = torch.func.vmap(torch.func.grad(loss), in_dims=dims)(values, record.gradient, *record.inputs)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedLayer(
                f"{type(self.layer).__name__} has no rule, and cannot be run for each example by itself: {error}"
            ) from error
        return {name.removeprefix("layer."): value for name, value in rows.items()}


class _Stock(nn.Module):
    """The layer's own forward, without the hooks on it, which have run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return type(self.layer).forward(self.layer, *args, **kwargs)


def refuse(layer: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Raise for layers that no re-run could tell the gradients of.

    Args:
        layer: without a rule.
        trained: its parameters whose gradients are wanted.

    Raises:
        UnsupportedLayer: naming the parameters, and the way out.
    """
    kind, names = type(layer).__name__, ", ".join(trained)
    parametrized = parametrize.is_parametrized(layer)
    inner = [name for name in trained if "." in name]
    if any(isinstance(part, _BatchNorm) for part in layer.modules()):
        raise UnsupportedLayer(f"{kind} ({names}) mixes examples; use GroupNorm or another that does not")
    if isinstance(layer, nn.RNNBase):
        raise UnsupportedLayer(f"{kind} ({names}) has no rule; use opacus.layers.DP{kind}, which loads its weights")
    if isinstance(layer, nn.EmbeddingBag):
        raise UnsupportedLayer(f"{kind} ({names}) has no rule; use nn.Embedding, and sum or average over positions")
    if isinstance(layer, nn.MultiheadAttention):
        raise UnsupportedLayer(f"a subclass {kind} of nn.MultiheadAttention ({names}) has no rule; use the original")
    if inner and not parametrized:
        own = ", ".join(name for name in trained if "." not in name)
        raise UnsupportedLayer(
            f"{kind} owns the parameters {own} beside layers that own {inner[0]}, so that nothing tells where they are "
            "used; put them into a module of their own whose forward uses them, such as one that adds them to its input"
        )
    if parametrized and any(True for _ in layer.buffers()):
        raise UnsupportedLayer(f"{kind} ({names}) keeps buffers that its parametrization changes")
