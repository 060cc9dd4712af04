"""From per-example gradients, however they are held, to their clipped sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robust_train.privacy.clipping.base import Clipping
from robust_train.privacy.engines.base import ClippedSum
from robust_train.privacy.engines.terms import Term, wide


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no products of float32 in fewer bits, whatever is set for training."""
    known: Any = torch.backends
    backends = (known.cuda.matmul, known.mkldnn.matmul, known.mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def combine(
    terms: dict[int, Term],
    parameters: Sequence[nn.Parameter],
    examples: int,
    unit: float,
    bound: float,
    clipping: Clipping,
    weights: Tensor | None,
) -> ClippedSum:
    """Clip and sum.

    Args:
        terms: the examples' gradients, by the number of the parameter; emptied.
        parameters: the parameters.
        examples: number of examples.
        unit: factor that turns the terms into the examples' gradients.
        bound: clipping norm.
        clipping: how to clip to it.
        weights: on each example's clipped gradient, shape ``(examples,)``; None: ones.

    Guarantees:
        An example whose gradient is not finite adds zero, whatever the rest.
    """
    device = parameters[0].device
    squares = [torch.zeros(examples, device=device, dtype=wide(p).dtype) for p in parameters]
    for i, term in terms.items():
        squares[i] += term.squared_norms()
    norms = unit * torch.stack(squares).sqrt()
    whole = norms.norm(dim=0)
    broken = ~whole.isfinite()
    factors = unit * clipping.factors(norms.masked_fill(broken, 0), bound).masked_fill(broken, 0)
    counted = broken
    if weights is not None:
        factors, counted = factors * weights.to(factors), broken & (weights.to(device) > 0)
    poisoned = bool(broken.any())
    gradients = [p.new_zeros(p.shape, dtype=wide(p).dtype) for p in parameters]
    while terms:
        i, term = terms.popitem()
        if poisoned:  # their factors are 0, but 0 * inf is not
            term = term.without(broken)
        gradients[i] = term.weighted_sum(factors[i].to(gradients[i].dtype)).reshape(parameters[i].shape)
    return ClippedSum(gradients, whole, int(counted.sum()) if poisoned else 0)
