"""How a layer's passes are recorded: an identity behind it, seen by the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_train.privacy.engines.base import RowsMismatch

Write = Callable[[tuple[Tensor, ...], Tensor], None]


@dataclass(frozen=True)
class Record:
    """One pass through a tap.

    Attributes:
        source: whose tap.
        part: which of its taps.
        inputs: what the layer was called with.
        gradient: of the loss with regard to what it returned.
    """

    source: Any
    part: Any
    inputs: tuple[Tensor, ...]
    gradient: Tensor


@dataclass
class Tape:
    """What was recorded, and whether to record.

    Attributes:
        forward: forward passes go through ``tap``.
        backward: the next backward pass through a tap is written down.
        records: one for each pass through a tap.
        step: to which they belong.
    """

    forward: bool = False
    backward: bool = False
    records: list[Record] = field(default_factory=list)
    step: Step = field(default_factory=lambda: Step())

    def reset(self, *, forward: bool) -> None:
        self.forward, self.backward, self.records, self.step = forward, False, [], Step()

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = self.forward, self.backward
        self.forward = self.backward = False
        try:
            yield
        finally:
            self.forward, self.backward = before

    def take(self) -> list[Record]:
        """The records, which are forgotten; further backward passes are let pass."""
        records = self.records
        self.reset(forward=self.forward)
        return records

    def writer(self, source: Any, part: Any = None) -> Write:
        """What a tap calls in a backward pass."""

        step = self.step

        def write(inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
            if not self.backward:
                return
            self.step.check(step)
            self.records.append(Record(source, part, inputs, gradient))

        return write


class Step:
    """Makes sure that all that is recorded comes from the forward passes of one step, and one backward pass."""

    current: int | None = None

    def check(self, forward: Step) -> None:
        """To be called in a backward pass.

        Args:
            forward: the step of the forward pass that it has come back to.

        Raises:
            RowsMismatch: that is another step, or this is another backward pass than the first that called.
        """
        if forward is not self:
            raise RowsMismatch(
                "the loss depends on a forward pass of an earlier step, whose rows were other examples'; detach "
                "what is carried from step to step"
            )
        # torch has no public name for the backward pass that is under way.
        current = torch._C._current_graph_task_id()
        if self.current not in (None, current):
            raise RowsMismatch(
                "several backward passes reached the parameters, whose gradients would count as one; backpropagate "
                "the sum of the losses once. Reentrant activation checkpoints count as passes: use_reentrant=False"
            )
        self.current = current


def tap(output: Tensor, inputs: Iterable[Tensor], write: Write, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Pass on a layer's ``output``, and have a backward pass call ``write(inputs, gradient)`` with its gradient.

    Args:
        output: computed with ``parameters`` seen as constants; it is passed on in place, nothing is copied.
        inputs: what its gradients are to be told from.
        write: called in backward.
        parameters: those that get a gradient of zeros, as data-parallel training waits for one.
    """
    shape, base = output.shape, output._base
    if base is not None and base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel():
        # An in-place function of a view costs copies of the gradient; a layer that returns its result reshaped does
        # not need one. torch has no public name for what a view is of.
        output = base
    keep = tuple(tensor.detach() for tensor in inputs)
    tapped = _Tap.apply(output, lambda kept, gradient: write(kept, gradient.reshape(shape)), keep, *parameters)
    return tapped if tapped.shape == shape else tapped.view(shape)


class _Tap(torch.autograd.Function):
    """The identity. In place, so that its result is no view, which an in-place activation could not follow."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, write: Write, inputs: tuple[Tensor, ...], *parameters: nn.Parameter
    ) -> Tensor:
        ctx.write, ctx.parameters = write, parameters
        ctx.save_for_backward(*inputs)  # by way of autograd: in-place changes are noticed, checkpoints recompute
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RowsMismatch(
                "create_graph=True: a gradient of a gradient cannot be split by example; a pass that the loss does not "
                "depend on can be made within paused()"
            )
        ctx.write(ctx.saved_tensors, gradient)
        zeros = (p.new_zeros(()).expand_as(p) for p in ctx.parameters)
        return gradient, None, None, *zeros


@contextmanager
def constants(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within, autograd sees ``parameters`` as constants."""
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
