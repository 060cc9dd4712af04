"""The output of a submodule as what is attacked, in place of the batch: for inputs that are discrete, such as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_train.callbacks._batch import fresh, get, take
from robust_train.callbacks._seams import backpropagated, checkpointing, on_call, output_changed, uncompiled_modules
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, loss_of
from robust_train.evasion.threat import Threat


class LayerReached(BaseException):
    """Cuts an extra call short once the layer's output is there. Not an ``Exception``, see ``LogitsReached``."""

    def __init__(self, output: Any, padding: Tensor | None) -> None:
        super().__init__()
        self.output, self.padding = output, padding


@dataclass(frozen=True)
class TokenThreat(Threat):
    """A threat on vectors of tokens ``(B, tokens, width)`` that leaves padding as it is.

    Args:
        padding: the vector of padding ``(width,)``; tokens that equal it cannot be moved.
    """

    padding: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().box(x)
        fixed = (x == self.padding.to(x)).all(-1, keepdim=True)
        return torch.where(fixed, x, low), torch.where(fixed, x, high)


class LayerVictim(StepVictim):
    """A step, seen from the output of ``layout.layer``.

    The layer is computed as ever and the perturbation is added to its output, so that gradients reach the layer's own
    parameters too, and an attack of radius 0 changes no bit. Where the layer is an ``nn.Embedding`` with a
    ``padding_idx``, tokens of padding are not perturbed.
    """

    _clean: Tensor | None = None
    _padding: Tensor | None = None
    _inside: list[object]  # calls that are under way, the innermost last: the others leave the layer alone

    def clean(self) -> Tensor:
        """The layer's output for the batch ``(B, ...)``, without gradients.

        Raises:
            StepSkipped: the step returned before it called the layer.
            ValueError: the step does not call it, or its output has no dimension for the batch first.
            TypeError: its output is no floating-point tensor.
        """
        if self._clean is None:
            reached = self._reached()
            self._clean, self._padding, self._inside = self._checked(reached.output), reached.padding, []
        return self._clean

    def within(self, threat: Threat) -> Threat:
        self.clean()
        if self._padding is None or type(threat) is not Threat:
            return threat
        names = ("norm", "eps", "low", "high", "mean", "std", "mutable")
        return TokenThreat(*(getattr(threat, name) for name in names), padding=self._padding)

    def take(self, index: Tensor) -> LayerVictim:
        clean = self.clean()
        other: Any = self._with_batch(take(self.batch, index, len(clean)))
        other._clean = clean[index]
        return other

    @contextmanager
    def trained_on(self, x: Tensor) -> Iterator[Any]:
        with self._moved(x) as calls:
            yield self.batch
        if not calls:
            raise RuntimeError(
                f"layer={self.layout.layer_name!r} was called when the training step was attacked and is not now: what "
                "the step does must not depend on how often it was called, and torch.compile must not reach the layer"
            )

    @contextmanager
    def _sent(self, x: Tensor) -> Iterator[Any]:
        with self._moved(x):
            yield fresh(self.batch)

    @contextmanager
    def _moved(self, x: Tensor) -> Iterator[list[int]]:
        """Inside, the layer returns ``x`` where it would return the clean output; yields a list of its calls."""
        delta = x - self.clean()
        layer, inside, calls = _layer(self.layout), self._inside, []

        def change(args: tuple[Any, ...], output: Tensor) -> Tensor:
            if inside[-1] is not calls:  # an extra call of an objective within the real one
                return output
            calls.append(1)
            if len(calls) > 1:
                raise ValueError(
                    f"layer={self.layout.layer_name!r} is called more than once in one step, and which of its outputs "
                    "is to be perturbed is not clear: name a submodule that is called once"
                )
            if checkpointing():
                raise ValueError(
                    f"layer={self.layout.layer_name!r} lies within activation checkpointing, which computes it again, "
                    "without its perturbation, in the backward pass: name a layer in front of the checkpointed part"
                )
            if not delta.requires_grad and not bool(delta.any()):
                return output
            pad = _padded(layer, args)
            return output + (delta if pad is None else delta.masked_fill(pad, 0.0)).to(output.dtype)

        inside.append(calls)
        try:
            with output_changed(layer, change):
                yield calls
        finally:
            inside.pop()

    def _reached(self) -> LayerReached:
        layer, called = _layer(self.layout), []

        def cut(args: tuple[Any, ...], output: Any) -> None:
            raise LayerReached(output, _padding_vector(layer, args, output))

        def call() -> LayerReached:
            try:
                with ExitStack() as stack:
                    for child in () if self._module.training else uncompiled_modules(self._module):
                        stack.enter_context(on_call(child, lambda *_: called.append(1)))
                    stack.enter_context(output_changed(layer, cut))
                    handed = stack.enter_context(backpropagated(self._module))
                    output = self._step(fresh(self.batch))
            except LayerReached as reached:
                return reached
            # an evaluation step need not return anything
            if loss_of(output) is None and not handed and (self._module.training or not called):
                raise StepSkipped
            raise ValueError(
                f"the step does not call layer={self.layout.layer_name!r}, so its output cannot be perturbed; name a "
                "submodule that it calls (inside of torch.compile none can be reached)"
            )

        return self._called(call)

    def _checked(self, output: Any) -> Tensor:
        name = self.layout.layer_name
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"layer={name!r} must return a floating-point tensor to be perturbed, got {found}")
        like = get(self.batch, self.layout.input_path) if self.labels is None else self.labels
        if output.ndim < 2 or len(output) != len(like):
            raise ValueError(
                f"layer={name!r} returns {tuple(output.shape)} for a batch of {len(like)}: the batch must come first, "
                "because perturbations are measured example by example (torch's recurrent layers: batch_first=True)"
            )
        return output.detach()


def layer_text(name: str) -> str:
    """What is attacked, for messages."""
    return f"the output of layer={name!r}"


def kind_of(layout: Layout) -> Callable[..., StepVictim]:
    """The class of the victims of this layout: seen from the batch, or from a layer."""
    return StepVictim if layout.layer is None else LayerVictim


def _layer(layout: Layout) -> nn.Module:
    assert layout.layer is not None  # noqa: S101
    return layout.layer


def _padded(layer: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
    """Which tokens are padding ``(B, tokens, 1)``; None where the layer does not know."""
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None or not args:
        return None
    return (args[0] == layer.padding_idx).unsqueeze(-1)


def _padding_vector(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """What the layer returns for padding ``(width,)``; None where that is not known, or not always the same."""
    pad = _padded(layer, args)
    if pad is None or not isinstance(output, Tensor):
        return None
    rows = output.detach()[pad.squeeze(-1)]
    return rows[0] if len(rows) and bool((rows == rows[0]).all()) else None
