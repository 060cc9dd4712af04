"""What the hooks engine needs of Opacus that has no public name. Nothing else may touch these attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from robust_train.privacy.engines.base import UnsupportedLayer
from robust_train.privacy.engines.layers import RULES
from robust_train.privacy.engines.layers.linear import refuse_packed
from robust_train.privacy.engines.tape import Step, tap

MAPPED = "ft_compute_sample_grad"  # where Opacus looks for what prepare_layer made
SUMMED = "_current_grad_sample"  # where it adds up a parameter's gradients, until all forward passes are through
COUNTED = "_forward_counter"  # how many of these are open: it never gets to hand over, as we count none


class OpacusHooks(GradSampleHooks):
    """Opacus' hooks, on chosen layers alone, and called by our tap in place of torch's backward hook.

    Torch's would forbid in-place activations behind a layer. Opacus matches the backward passes through a layer with
    its forward passes by their order; a tap knows which is whose.

    Args:
        module: whose layers these are.
        layers: to put hooks on, each with a grad sampler or fit for functorch.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers, self.armed = list(layers), False
        self.mapped = {layer: _mapped(layer) for layer in layers if type(layer) not in self.GRAD_SAMPLERS}
        self.marked = [p for p in module.parameters() if p.requires_grad]  # Opacus puts attributes on these
        # The sum: gradients of the loss as it is. Strict would refuse because of what other parts of the module hold.
        super().__init__(module, loss_reduction="sum", strict=False)
        self.disable_hooks()
        self.forget()

    def add_hooks(self, **settings: Any) -> None:
        # The name by which Opacus takes its hooks off again.
        hook: Any = self.after_forward  # pyright: ignore[reportAttributeAccessIssue]
        self.autograd_grad_sample_hooks = [layer.register_forward_hook(hook, prepend=True) for layer in self.layers]

    @torch.compiler.disable
    def after_forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Have Opacus told of a pass through a layer when its gradient comes."""
        if not (self.hooks_enabled and torch.is_grad_enabled()):
            return None
        if not isinstance(output, Tensor) or not all(isinstance(x, Tensor) for x in inputs):
            raise UnsupportedLayer(f"{type(layer).__name__} takes or returns something else than tensors")
        if isinstance(layer, RNNLinear):
            refuse_packed(layer)

        step = self.step

        def write(inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
            if self.hooks_enabled and self.armed:
                self.step.check(step)
                self._sample(layer, inputs, gradient)

        # A copy of what we do not know: whatever computed it may keep it for its own backward pass.
        return tap(output if type(layer) in RULES else output.clone(), inputs, write, ())

    def _sample(self, layer: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        self.sizes[len(gradient)] = layer
        if len(self.sizes) > 1:  # which will be refused, and which Opacus cannot add
            return
        layer.__dict__["activations"] = [list(inputs)]
        if layer in self.mapped:
            layer.__dict__[MAPPED] = self.mapped[layer]
        gradients: Any = (gradient,)  # a tuple, whatever the signature says
        try:
            self.capture_backprops_hook(layer, gradient, gradients, self.loss_reduction, self.batch_first)
        finally:
            for name in ("activations", "max_batch_len", MAPPED):
                layer.__dict__.pop(name, None)

    def rows(self, parameter: nn.Parameter) -> Tensor | None:
        """Gradients for each row of the batch, of all passes in sum."""
        return vars(parameter).get(SUMMED)

    def forget(self) -> None:
        """Drop all that was recorded, also by passes that broke off."""
        self.armed, self.step = False, Step()
        self.sizes: dict[int, nn.Module] = {}  # how many rows came, and through which layer
        for p in self.marked:
            vars(p).pop(SUMMED, None)
            setattr(p, COUNTED, 0)

    def close(self) -> None:
        """Take everything off the module again."""
        self.forget()
        self.cleanup()
        self.marked = []

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of the module, by copy or pickle, get hooks that do nothing.
        return _Inert, ()


def _mapped(layer: nn.Module) -> Any:
    """The layer's per-example gradient by functorch, which Opacus leaves on the layer, where it stops it from pickling.

    Raises:
        UnsupportedLayer: it cannot be made.
    """
    try:
        prepare_layer(layer)
    except NotImplementedError as error:
        raise UnsupportedLayer(f"{type(layer).__name__}: {error}") from error
    return layer.__dict__.pop(MAPPED)


class _Inert:
    """What the hooks on a copied module belong to."""

    hooks_enabled = False

    def after_forward(self, *args: Any) -> None: ...
