"""Per-example gradients one example at a time, in float64: what every engine is measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robust_train.privacy.clipping.base import Clipping
from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.engines.base import ClippedSum, Engine

Loss = Callable[..., Tensor]  # of a module and a batch's tensors: the mean over their rows


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def gradients(module: nn.Module, loss: Loss, batch: tuple[Tensor, ...], examples: int) -> list[Tensor]:
    """The gradient of each example, the mean over its rows: for each parameter, ``(examples, *shape)``."""
    double = copy.deepcopy(module).double()
    rows = []
    for i in range(examples):
        mine = [x.double() if x.is_floating_point() else x for x in (x.chunk(examples)[i] for x in batch)]
        found = torch.autograd.grad(loss(double, *mine), trained(double), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(trained(double), found, strict=True)])
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def exact(rows: list[Tensor], bound: float, clipping: Clipping, weights: Tensor | None = None) -> ClippedSum:
    """The clipped sum of gradients written out."""
    norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in rows])
    factors = clipping.factors(norms, bound)
    factors = factors if weights is None else factors * weights
    sums = [torch.einsum("n,n...->...", f, g) for f, g in zip(factors, rows, strict=True)]
    return ClippedSum(sums, norms.norm(dim=0), 0)


def recorded(engine: Engine, loss: Loss, batch: tuple[Tensor, ...], scale: float = 1.0) -> Tensor:
    """One training step's passes; returns the loss."""
    engine.start()
    value = loss(engine.module, *batch) / scale
    engine.arm()
    value.backward()
    return value.detach()


def check(
    kind: type[Engine],
    module: nn.Module,
    loss: Loss,
    batch: tuple[Tensor, ...],
    *,
    views: int = 1,
    scale: float = 1.0,
    weights: Tensor | None = None,
    clipping: Clipping | None = None,
    tolerance: float = 1e-5,
) -> Engine:
    """Compare an engine's norms and clipped sum with the exact ones; half of the examples are clipped."""
    clipping = clipping or Flat()
    examples = len(batch[0]) // views
    rows = gradients(module, loss, batch, examples)
    bound = max(exact(rows, 1.0, clipping).norms.median().item(), 1e-3)
    expected = exact(rows, bound, clipping, weights)
    engine = kind(module, trained(module))
    try:
        recorded(engine, loss, batch, scale)
        result = engine.clipped_sum(examples, bound, clipping, views=views, scale=scale, weights=weights)
    finally:
        engine.close()
        module.zero_grad()
    assert result.zeroed == 0
    assert_near(result, expected, tolerance)
    for p, g in zip(trained(module), result.gradients, strict=True):
        assert g.shape == p.shape
        assert g.dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
    return engine


def assert_near(result: ClippedSum, expected: ClippedSum, tolerance: float) -> None:
    """Equal but for ``tolerance`` of the largest norm, and of each sum's norm; sums may cancel."""
    scale = expected.norms.abs().max()
    assert (result.norms - expected.norms).abs().max() <= tolerance * scale
    for g, e in zip(result.gradients, expected.gradients, strict=True):
        assert (g - e).norm() <= tolerance * (e.norm() + 0.1 * scale)
