"""A schema from rows that are trusted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor

from robust_train.poisoning.checks import ALPHA, digests, extremes
from robust_train.poisoning.schema import Schema

HEADROOM = 0.5  # of the width of the values seen, at each end
KNOWN_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
TOUCHES = 0.02  # share of a known range's width within which the values seen must come to both of its ends
SIGHTINGS = 5  # rows of every class that it takes to believe that there is no other
MOST_CLASSES = 4096
CHANNELS, FEATURES = 4, 1024  # up to which a range is inferred for each
VARIED = 16  # numbers in a row from which on a row of equal ones is no coincidence
TELLING = 64  # numbers in a row from which on two equal rows are no coincidence


@dataclass(frozen=True)
class Observation:
    """What is kept of one trusted batch.

    Attributes:
        rows: how many.
        dtype: of the inputs.
        shape: of one row.
        low: smallest values, one for each channel or feature, or one for all.
        high: largest ones.
        constant: some row's numbers were all equal.
        label_dtype: None where the batch has no labels; so all below.
        label_shape: of one label.
        labels: label to the number of rows that have it; None where they are no class labels.
        contents: digests of content and label of each row.
    """

    rows: int
    dtype: str
    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    constant: bool
    label_dtype: str | None = None
    label_shape: tuple[int, ...] | None = None
    labels: dict[int, int] | None = None
    contents: tuple[tuple[bytes, bytes], ...] = ()


def observe(x: Tensor, y: Tensor | None = None) -> Observation:
    """Look at one trusted batch.

    Args:
        x: inputs ``(B, ...)``, B >= 1.
        y: labels ``(B, ...)``, or None.

    Raises:
        ValueError: inputs or labels hold NaN or infinities.
    """
    shape = tuple(x.shape[1:])
    channels = len(shape) == 1 and shape[0] <= FEATURES and x.is_floating_point()
    channels |= len(shape) >= 3 and shape[0] <= CHANNELS
    lows, highs = extremes(x, by_channel=channels)
    if not (lows.isfinite() & highs.isfinite()).all():
        raise ValueError("trusted inputs hold NaN or infinite numbers: no schema can be inferred from them")
    if y is not None and not y.isfinite().all():
        raise ValueError("trusted labels hold NaN or infinite numbers: no schema can be inferred from them")
    seen = Observation(
        rows=len(x),
        dtype=_name(x),
        shape=shape,
        low=tuple(lows.amin(0).tolist()),
        high=tuple(highs.amax(0).tolist()),
        constant=bool(lows.numel() and (lows.amin(1) == highs.amax(1)).any()),
    )
    if y is None:
        return seen
    label_of_content = tuple(zip(digests(x), digests(y), strict=True))
    own = {"label_dtype": _name(y), "label_shape": tuple(y.shape[1:]), "labels": _classes(y)}
    return Observation(**{**vars(seen), **own, "contents": label_of_content})


def infer(observations: Sequence[Observation], source: str = "") -> Schema:
    """The schema that trusted batches fit, wide enough for others of their kind.

    * Sizes that differ between the batches are free.
    * Values that fill ``[0, 1]``, ``[-1, 1]`` or ``[0, 255]`` (to 2 % of the width at both ends) have exactly that
      range. Others get a headroom of half the width that was seen at each end, and what was never negative stays so.
      One range for each channel of an image or feature of a table, else one for all.
    * Labels are a closed set of classes once each was seen on at least 5 rows; then their shares are expected again,
      within a tolerance that covers what so few rows leave open (confidence intervals at 1 - 1e-4).
    * Rows of equal numbers are forbidden if none was seen, and rows have at least 16 numbers; equal rows with
      different class labels likewise, from 64 numbers on.

    Args:
        observations: of the trusted batches, at least one.
        source: where they come from, in a sentence.

    Raises:
        ValueError: the batches are of different kinds.

    Guarantees:
        The batches observed fit the schema. The order of the observations does not matter.
    """
    if not observations:
        raise ValueError("a schema cannot be inferred from no data")
    dtype, label_dtype = _one("dtypes", observations, "dtype"), _one("label dtypes", observations, "label_dtype")
    shape = _sizes("shapes", [o.shape for o in observations])
    low, high = _range(observations, shape)
    numbers = min(math.prod(o.shape) for o in observations)
    label_shapes = [o.label_shape for o in observations if o.label_shape is not None]
    labels = _label_counts(observations)
    closed = labels if labels and min(labels.values()) >= SIGHTINGS else None
    scalar = all(o.label_shape == () for o in observations)
    shares, tolerance = _shares(closed, sum(o.rows for o in observations)) if closed and scalar else (None, 0.05)
    return Schema(
        dtype=dtype,
        shape=shape,
        low=low,
        high=high,
        constant_rows=numbers < VARIED or any(o.constant for o in observations),
        label_dtype=label_dtype,
        label_shape=_sizes("label shapes", label_shapes) if label_shapes else None,
        classes=None if closed is None else tuple(closed),
        shares=shares,
        share_tolerance=tolerance,
        conflicting_labels=labels is None or numbers < TELLING or _conflict(observations),
        source=source,
    )


def _range(
    observations: Sequence[Observation], shape: tuple[int | None, ...]
) -> tuple[float | tuple[float, ...] | None, float | tuple[float, ...] | None]:
    if not all(o.low for o in observations):  # rows without numbers
        return None, None
    least, most = min(min(o.low) for o in observations), max(max(o.high) for o in observations)
    whole = not getattr(torch, observations[0].dtype).is_floating_point
    groups = len(observations[0].low)
    if groups == 1 or not shape or shape[0] != groups or _known(least, most):
        return _widened(least, most, whole)
    bounds = []
    for i in range(groups):
        low, high = min(o.low[i] for o in observations), max(o.high[i] for o in observations)
        # a feature that never moved says nothing of how far it may
        bounds.append(_widened(low, high, whole) if low < high else _widened(least, most, whole))
    lows, highs = zip(*bounds, strict=True)
    return (lows[0], highs[0]) if len(set(bounds)) == 1 else (lows, highs)


def _known(low: float, high: float) -> tuple[float, float] | None:
    for a, b in KNOWN_RANGES:
        slack = TOUCHES * (b - a)
        if a <= low <= a + slack and b - slack <= high <= b:
            return a, b
    return None


def _widened(low: float, high: float, whole: bool) -> tuple[float, float]:
    if known := _known(low, high):
        return known
    room = HEADROOM * ((high - low) or abs(high) or 1.0)
    if whole:
        room = math.ceil(room)
    return (0.0 if low >= 0 and room >= low else low - room), high + room


def _shares(counts: dict[int, int], rows: int) -> tuple[tuple[float, ...], float]:
    """Shares, and the widest of their confidence intervals (Clopper and Pearson 1934; Bonferroni over the classes)."""
    level = ALPHA / (2 * len(counts))
    upper = [float(beta.isf(level, k + 1, rows - k)) - k / rows if k < rows else 0.0 for k in counts.values()]
    lower = [k / rows - float(beta.ppf(level, k, rows - k + 1)) for k in counts.values()]
    return tuple(k / rows for k in counts.values()), math.ceil(1000 * max(*upper, *lower)) / 1000


def _label_counts(observations: Sequence[Observation]) -> dict[int, int] | None:
    total: Counter[int] = Counter()
    for o in observations:
        if o.labels is None:
            return None
        total.update(o.labels)
    return dict(sorted(total.items())) if len(total) <= MOST_CLASSES else None


def _classes(y: Tensor) -> dict[int, int] | None:
    """Rows that have each label; floating-point labels are class labels only where they are all 0 or 1."""
    values = y.detach().cpu()
    found = values.unique()
    if len(found) > MOST_CLASSES or (values.is_floating_point() and not torch.isin(found, torch.tensor([0, 1])).all()):
        return None
    rows = values.reshape(len(values), -1)
    return {int(v): int((rows == v).any(1).sum()) for v in found}


def _conflict(observations: Sequence[Observation]) -> bool:
    label_of: dict[bytes, bytes] = {}
    pairs = (pair for o in observations for pair in o.contents)
    return any(label_of.setdefault(content, label) != label for content, label in pairs)


def _sizes(what: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int | None, ...]:
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"trusted batches have rows of different {what}: {sorted(set(shapes))}")
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))


def _one(what: str, observations: Sequence[Observation], name: str) -> str | None:
    found = {getattr(o, name) for o in observations}
    if len(found) > 1:
        raise ValueError(f"trusted batches have different {what}: {', '.join(sorted(map(str, found)))}")
    return found.pop()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
