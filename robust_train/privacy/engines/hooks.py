"""Opacus' hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robust_train.privacy.clipping.base import Clipping
from robust_train.privacy.engines._opacus_hooks import OpacusHooks
from robust_train.privacy.engines.base import ClippedSum, Engine, RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.combine import combine, full_precision
from robust_train.privacy.engines.layers import owners, rule
from robust_train.privacy.engines.terms import Rows, Term, added_up, wide


class Hooks(Engine):
    """Opacus writes out the gradients of every row of the batch: slow, large, and the one to compare others with.

    Args:
        module: whose per-example gradients are wanted.
        parameters: of the module, each requiring a gradient.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(module, parameters)
        found = list(owners(module, set(self.parameters)))
        for name, layer, trained in found:
            rule(name, layer, trained)  # what it refuses, Opacus would get wrong
            if reason := _beyond_opacus(layer):
                raise UnsupportedLayer(f"{name or 'the module'}: {reason}; the book-keeping engine can")
        self._hooks = OpacusHooks(module, [layer for _, layer, _ in found])
        torch.compiler.reset()  # what was compiled before knows nothing of hooks, and does not look for them

    def start(self) -> None:
        self.stop()
        self._hooks.enable_hooks()

    def stop(self) -> None:
        self._hooks.disable_hooks()
        self._hooks.forget()

    def arm(self) -> None:
        self._hooks.armed = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = self._hooks.hooks_enabled
        self._hooks.disable_hooks()
        try:
            yield
        finally:
            self._hooks.hooks_enabled = before

    def close(self) -> None:
        self.stop()
        self._hooks.close()
        torch.compiler.reset()

    @torch.no_grad()
    def clipped_sum(
        self,
        examples: int,
        bound: float,
        clipping: Clipping,
        *,
        views: int = 1,
        scale: float = 1.0,
        weights: Tensor | None = None,
    ) -> ClippedSum:
        try:
            rows = self._rows(examples * views)
        finally:
            self._hooks.forget()
        terms: dict[int, Term] = {}
        while rows:
            i, values = rows.popitem()
            terms[i] = Rows(added_up(wide(values), examples))
        with full_precision(self.parameters[0].device):
            return combine(terms, self.parameters, examples, examples * scale, bound, clipping, weights)

    def _rows(self, expected: int) -> dict[int, Tensor]:
        """The gradients that Opacus wrote, by the parameters' places."""
        if not self._hooks.sizes:
            raise RowsMismatch("no backward pass was recorded: call start() before the forward pass, arm() after it")
        for size, layer in self._hooks.sizes.items():
            if size != expected:
                raise RowsMismatch(
                    f"a {type(layer).__name__} was called with {size} rows in a batch of {expected}: the first "
                    "dimension of every layer's input is to run over the rows of the batch"
                )
        rows = [(i, self._hooks.rows(p)) for i, p in enumerate(self.parameters)]
        return {i: each for i, each in rows if each is not None}


def _beyond_opacus(layer: nn.Module) -> str | None:
    """What Opacus' grad samplers get wrong, of what has a rule."""
    if isinstance(layer, nn.MultiheadAttention):
        return "Opacus has no rule for nn.MultiheadAttention, but opacus.layers.DPMultiheadAttention in its place"
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        return "Opacus gives the row padding_idx a gradient, which it should not have"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros":
        return f"Opacus pads with zeros, whatever padding_mode says, here {layer.padding_mode!r}"
    if isinstance(layer, SequenceBias) and not layer.batch_first:
        return "Opacus takes positions for rows in SequenceBias"
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        return "Opacus expects nn.LayerNorm to have a bias"
    if parametrize.is_parametrized(layer):
        return "Opacus does not see through torch.nn.utils.parametrize"
    return None
