"""Checks that a training step's loss can be split by example, made on synthetic rows before anything is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS = 4
DRAWS = 3


class GuaranteeVoid(ValueError):
    """The training step breaks what DP-SGD's guarantee rests on; the message says where, why, and what to change."""


class Probe(ABC):
    """The user's training step, as the checks call it. Every call leaves no trace."""

    @abstractmethod
    def per_example(self, samples: Sequence[Any], seed: int, weights: Tensor | None = None) -> list[Tensor]:
        """The engine's weighted sum of per-example gradients, unclipped, for each parameter."""

    @abstractmethod
    def plain(self, samples: Sequence[Any], seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The gradient that an ordinary backward pass gives, for each parameter; and the buffers afterwards."""

    @abstractmethod
    def first_rows(self, samples: Sequence[Any], seed: int) -> list[tuple[str, Tensor, Tensor]]:
        """Name and kind of each module that was called, in order, with its input and output for the first example."""

    @property
    @abstractmethod
    def where(self) -> str:
        """File and line of the training step."""


def check(probe: Probe, pool: Sequence[Any], names: Sequence[str], tolerance: float, seed: int = 0) -> None:
    """Refuse a training step whose gradient is no mean of per-example gradients that know nothing of one another.

    Three properties, on several draws of synthetic rows: *completeness*, the per-example gradients add up to the
    gradient of the loss; *independence*, an example's gradient stays as it is when the other examples change, or
    their number; *nothing else is kept*, no buffer takes data past the noise.

    Args:
        probe: the training step.
        pool: some of the dataset's samples: they show the structure, and the range of every field.
        names: of the parameters, in the probe's order.
        tolerance: relative error that is put down to rounding.
        seed: of the synthetic rows.

    Raises:
        GuaranteeVoid: one of them does not hold.
    """
    rng = np.random.default_rng(seed)
    for draw in range(DRAWS):
        samples = synthetic(pool, ROWS, rng)
        others = synthetic(pool, ROWS, rng)
        _check_complete(probe, samples, names, tolerance, draw)
        _check_independent(probe, samples, [samples[0], *others[1:]], tolerance, draw)
        _check_batch_size(probe, samples, tolerance, draw)
        _check_buffers(probe, samples, others, draw)


def _check_complete(probe: Probe, samples: Sequence[Any], names: Sequence[str], tolerance: float, seed: int) -> None:
    plain, _ = probe.plain(samples, seed)
    found = [g / len(samples) for g in probe.per_example(samples, seed)]
    scale = _norm(plain)
    off = [n for n, a, b in zip(names, found, plain, strict=True) if _norm([a - b]) > tolerance * max(scale, 1e-12)]
    if off:
        error = _norm([a - b for a, b in zip(found, plain, strict=True)]) / max(scale, 1e-12)
        raise GuaranteeVoid(
            f"the per-example gradients of {_some(off)} do not add up to the gradient of the loss (relative error "
            f"{error:.2g}) in {probe.where}. Something reaches these parameters past their layer: a weight that is "
            "used as a tensor, or a penalty that is written into the loss. Call the layer itself, and give penalties "
            "to the optimizer (weight_decay)"
        )


def _check_independent(
    probe: Probe, samples: Sequence[Any], changed: Sequence[Any], tolerance: float, seed: int
) -> None:
    first = torch.eye(len(samples))[0]
    a, b = probe.per_example(samples, seed, first), probe.per_example(changed, seed, first)
    if _difference(a, b) <= tolerance:
        return
    mixer = next(
        (
            name
            for (name, x, out), (other, y, changed_out) in zip(
                probe.first_rows(samples, seed), probe.first_rows(changed, seed), strict=False
            )
            if name == other and _same(x, y, tolerance) and not _same(out, changed_out, tolerance)
        ),
        None,
    )
    culprit = f"{mixer} mixes the examples of a batch" if mixer else f"{probe.where} mixes them"
    raise GuaranteeVoid(
        f"an example's gradient changes by {_difference(a, b):.2g} when the other examples of its batch change: "
        f"{culprit}. One person would then move other people's clipped gradients, and no epsilon holds. Batch "
        "normalisation: fix_modules=True, or GroupNorm. Weighted means, mixup, contrastive losses, means over the "
        'valid tokens of a batch: make each example\'s loss its own, and average those with reduction="mean"'
    )


def _check_batch_size(probe: Probe, samples: Sequence[Any], tolerance: float, seed: int) -> None:
    half = len(samples) // 2
    a = probe.per_example(samples, seed, torch.eye(len(samples))[0])
    b = probe.per_example(samples[:half], seed, torch.eye(half)[0])
    if _difference(a, b) <= tolerance:
        return
    # random layers draw other numbers for another number of rows: then only the size of the gradient can tell
    again = probe.per_example(samples, seed + 1000, torch.eye(len(samples))[0])
    ratio = _norm(a) / max(_norm(b), 1e-12)
    if _difference(a, again) > tolerance and 0.67 < ratio < 1.5:
        return
    raise GuaranteeVoid(
        f"an example's gradient becomes {ratio:.3g} times as long when its batch has {len(samples)} examples in place "
        f"of {half}: the loss in {probe.where} is not the mean of the examples' losses. Average it over the batch "
        '(reduction="mean"), without sums and without statistics of the batch'
    )


def _check_buffers(probe: Probe, samples: Sequence[Any], others: Sequence[Any], seed: int) -> None:
    _, a = probe.plain(samples, seed)
    _, b = probe.plain(others, seed)
    moved = [name for name in a if not torch.equal(a[name], b[name])]
    if moved:
        raise GuaranteeVoid(
            f"the training step writes into {_some(moved)} what it computes from the data, and checkpoints keep it "
            "without noise (running statistics of a normalisation layer?). Use layers without running statistics "
            "(fix_modules=True), or register the buffer with persistent=False"
        )


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and _difference([a], [b]) <= tolerance


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm()) if tensors else 0.0


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Relative to the larger of the two; anything that is not a number counts as different."""
    apart = _norm([x.double() - y.double() for x, y in zip(a, b, strict=True)])
    scale = max(_norm(a), _norm(b))
    return apart / scale if scale > 1e-12 else 0.0


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# --- synthetic samples --------------------------------------------------------------------------------------------


def synthetic(pool: Sequence[Any], n: int, rng: np.random.Generator) -> list[Any]:
    """Samples of the pool's structure whose numbers are random.

    Floating-point fields are uniform within the range that the field has in the pool; whole numbers and truth values
    are drawn, element by element, from those that the field takes there; text and foreign objects stay as they are.

    Args:
        pool: samples of the dataset.
        n: how many to make.
        rng: where the numbers come from.
    """
    flat = [_flatten(sample) for sample in pool]
    out = []
    for i in range(n):
        model = int(rng.integers(len(pool))) if len(pool) > n else i % len(pool)
        values = {}
        for path, leaf in flat[model].items():
            values[path] = _random_like(leaf, [f[path] for f in flat if path in f], rng)
        out.append(_rebuilt(pool[model], values, ()))
    return out


def _random_like(leaf: Any, field: Sequence[Any], rng: np.random.Generator) -> Any:
    if isinstance(leaf, Tensor):
        return torch.from_numpy(_random_array(_array(leaf), [_array(v) for v in field], rng)).to(leaf.dtype)
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "fiub":
        made = _random_array(np.asarray(leaf), [np.asarray(v) for v in field], rng).astype(leaf.dtype)
        return made if isinstance(leaf, np.ndarray) else made[()]
    if isinstance(leaf, (bool, int, float)):
        return type(leaf)(_random_array(np.asarray(leaf), [np.asarray(v) for v in field], rng))
    return leaf


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def _random_array(leaf: np.ndarray, field: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    values = np.concatenate([np.ravel(v) for v in field])
    if not values.size or not leaf.size:
        return np.array(leaf)
    if leaf.dtype.kind == "f":
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        return rng.uniform(low, high, leaf.shape)
    return rng.choice(np.unique(values), leaf.shape)


def _flatten(sample: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    children = _children(sample)
    if children is None:
        return {path: sample}
    return {k: v for key, child in children for k, v in _flatten(child, (*path, key)).items()}


def _children(sample: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(sample, Mapping):
        return list(sample.items())
    if isinstance(sample, (list, tuple)):
        return list(enumerate(sample))
    if is_dataclass(sample) and not isinstance(sample, type):
        return [(f.name, getattr(sample, f.name)) for f in fields(sample) if f.init]
    return None


def _rebuilt(sample: Any, values: Mapping[tuple[Any, ...], Any], path: tuple[Any, ...]) -> Any:
    children = _children(sample)
    if children is None:
        return values[path]
    made = {key: _rebuilt(child, values, (*path, key)) for key, child in children}
    if isinstance(sample, dict):
        return type(sample)(made) if type(sample) is dict else {**made}
    if isinstance(sample, Mapping):
        return dict(made)
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return type(sample)(*made.values())
    if isinstance(sample, (list, tuple)):
        return type(sample)(made.values())
    return replace(sample, **made)
