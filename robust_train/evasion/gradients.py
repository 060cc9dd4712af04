"""Gradients of a victim's loss in its input, also where half precision would lose them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

START = 2.0**10  # where fp16 is seen and nobody gave a scale
RAISE = 2.0**8
LOWER = 2.0**4
HIGHEST = 2.0**40


@dataclass
class LossScale:
    """Factor on the loss while it is differentiated, so that small gradients do not underflow in fp16.

    Attributes:
        value: the factor, a power of two; gradients are divided by it afterwards.
        second: a larger one, too large for some examples, for those whose gradient is lost with ``value``; None: none.
        searched: larger ones were tried where gradients were zero.
        fixed: never try another, because processes that work together must make equally many passes.
    """

    value: float = 1.0
    second: float | None = None
    searched: bool = False
    fixed: bool = False

    def larger(self) -> Iterator[float]:
        """Factors to try for examples without a gradient."""
        if self.searched:
            yield from () if self.second is None else (self.second,)
            return
        factor = self.value * RAISE
        while factor <= HIGHEST:
            yield factor
            factor *= RAISE

    def note(self, factor: float, *, alone: bool) -> None:
        """Remember a factor that saved some gradients: alone it would have done, or only beside ``value``."""
        if alone:
            self.value = factor
        else:
            self.second = factor


@dataclass
class Harvest:
    """Gradients in the parameters, picked up where an attack differentiates in the input anyway.

    Attributes:
        parameters: what is differentiated in, besides the input.
        gradients: their gradients so far, of mean losses, summed; None where there was none.
        loss: those losses, summed.
        count: how many points they were taken at.
    """

    parameters: Sequence[nn.Parameter]
    gradients: list[Tensor | None] = field(default_factory=list)
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    count: int = 0

    def add(self, loss: Tensor, gradients: Sequence[Tensor | None], scale: float) -> None:
        """Add the loss at one more point, and gradients that were taken of ``scale`` times its sum."""
        new = [None if g is None else g / (scale * loss.numel()) for g in gradients]
        self.loss = self.loss.to(loss.device) + loss.detach().float().mean()
        old = self.gradients or [None] * len(new)
        self.gradients = [b if a is None else a if b is None else a + b for a, b in zip(old, new, strict=True)]
        self.count += 1


def is_half(*tensors: Tensor) -> bool:
    """Whether fp16 is at work, as far as can be seen: in a tensor, or in autocast."""
    device = tensors[0].device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(t.dtype == torch.float16 for t in tensors)


def any_in_row(mask: Tensor) -> Tensor:
    """Which examples of ``(B, ...)`` have a true entry, ``(B,)``."""
    return mask.reshape(len(mask), -1).any(1)


def unscaled(grad: Tensor, scale: float) -> Tensor:
    """A gradient of ``scale`` times the loss as that of the loss, in float32 where fp16 would lose it again."""
    if scale == 1.0:
        return grad
    return (grad.float() if grad.dtype == torch.float16 else grad) / scale
