"""Other weights in a network's place, for as long as they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def exchanged(network: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the network computes with other parameters and buffers.

    Nothing is written: the network holds the other tensors meanwhile, and gradients flow to whatever those were made
    of. Afterwards it holds its own again, the same objects, also after an exception.

    Args:
        network: its submodules included.
        tensors: what stands in place of which of its parameters and buffers (the same objects), of the same shape.
    """
    undo: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    flat: list[tuple[nn.RNNBase, list[Tensor | None]]] = []
    try:
        for module in network.modules():
            for held in (module._parameters, module._buffers):
                for name, own in list(held.items()):
                    if own is not None and own in tensors:
                        undo.append((held, name, own))  # type: ignore[arg-type]
                        held[name] = tensors[own]  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):  # computes with a list of its own
                flat.append((module, module._flat_weights))
                module._flat_weights = [w if w is None else tensors.get(w, w) for w in module._flat_weights]
        yield
    finally:
        for held, name, own in undo:
            held[name] = own
        for module, weights in flat:
            module._flat_weights = weights
