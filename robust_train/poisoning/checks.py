"""Rows of a batch, held against a schema."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from robust_train.poisoning.schema import Schema

ALPHA = 1e-4  # chance that a test of the class shares is a false alarm
SHOWN = 8  # rows that a message lists


@dataclass(frozen=True)
class Violation:
    """A rule that a batch breaks.

    Args:
        rule: one of ``schema.RULES``.
        rows: positions in the batch; empty where no single row is at fault.
        message: what is wrong with which values.
    """

    rule: str
    rows: tuple[int, ...]
    message: str

    def __str__(self) -> str:
        more = f", … ({len(self.rows)} rows)" if len(self.rows) > SHOWN else ""
        where = f" (rows {', '.join(map(str, self.rows[:SHOWN]))}{more})" if self.rows else ""
        return f"{self.rule}: {self.message}{where}"


class DataViolation(ValueError):
    """Data do not fit their schema.

    Attributes:
        violations: the rules that are broken.
    """

    def __init__(self, text: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(text)
        self.violations = tuple(violations)


def check(schema: Schema, x: Tensor, y: Tensor | None = None, skip: Collection[str] = ()) -> list[Violation]:
    """Hold a batch against a schema, by all rules that judge a row alone.

    Args:
        schema: what rows must look like.
        x: inputs, shape ``(B, ...)``, on any device; they are read once.
        y: labels, shape ``(B, ...)``; None: there are none to check.
        skip: rules that are left out.

    Returns:
        One violation for each rule that is broken; an empty list for a batch without fault.

    Raises:
        ValueError: ``x`` or ``y`` has no rows, or not equally many.

    Guarantees:
        Whether a row is at fault does not depend on the other rows. Rows that have been checked without fault pass
        again, in any order and any part of them.
    """
    _refuse_other_rows(x, y)
    if not len(x):
        return []
    found = list(_kind("dtype", "shape", schema.dtype, schema.shape, x))
    if y is not None:
        found += _kind("label_dtype", "label_shape", schema.label_dtype, schema.label_shape, y)
    broken = {violation.rule for violation in found}
    masks: dict[str, Tensor] = {}
    lows, highs = extremes(x, by_channel=isinstance(schema.low, tuple) or isinstance(schema.high, tuple))
    if "shape" not in broken and lows.numel():
        if schema.finite:
            masks["finite"] = ~(lows.isfinite() & highs.isfinite()).all(1)
        below = lows < (-math.inf if schema.low is None else _bound(schema.low, lows, torch.minimum))
        above = highs > (math.inf if schema.high is None else _bound(schema.high, highs, torch.maximum))
        masks["range"] = (below | above).any(1)
        if not schema.constant_rows:
            masks["constant"] = lows.amin(1) == highs.amax(1)
    if y is not None and y.numel() and "label_shape" not in broken:
        masks["labels"] = _foreign(y, schema.classes).reshape(len(y), -1).any(1).cpu()
    for rule, mask in masks.items():
        rows = mask.nonzero()[:, 0]
        if len(rows):
            text = _say(rule, schema, lows[rows], highs[rows], None if y is None else y.cpu()[rows])
            found.append(Violation(rule, tuple(rows.tolist()), text))
    return [violation for violation in found if violation.rule not in skip]


def check_shares(schema: Schema, counts: Mapping[int, int]) -> Violation | None:
    """Hold the classes' shares among many rows against the expected ones, by a binomial test of each class.

    The hypothesis is that rows are independent and that the true share of each class lies within ``share_tolerance`` of
    the expected one; drawing without replacement only makes alarms rarer. Bonferroni over the classes.

    Args:
        schema: with ``shares``; without, nothing is found.
        counts: how many rows each label was seen on; labels that are no class are not counted.

    Guarantees:
        A false alarm has a probability of at most ``ALPHA`` for one call.
    """
    if schema.shares is None or schema.classes is None:
        return None
    seen = [counts.get(c, 0) for c in schema.classes]
    n, level = sum(seen), ALPHA / (2 * len(seen))
    odd = []
    for label, k, share in zip(schema.classes, seen, schema.shares, strict=True):
        most, least = min(1.0, share + schema.share_tolerance), max(0.0, share - schema.share_tolerance)
        p = min(binom.sf(k - 1, n, most), binom.cdf(k, n, least)) if n else 1.0
        if p < level:
            odd.append(f"class {label} has a share of {k / n:.3f}, expected {share:.3f}")
    if not odd:
        return None
    text = f"{'; '.join(odd[:SHOWN])}; among {n} rows, beyond a tolerance of {schema.share_tolerance:g} and chance"
    return Violation("balance", (), text)


class SeenRows:
    """Contents of rows that were seen, to find equal ones with different labels.

    Args:
        limit: how many contents are remembered (about 200 bytes each); beyond it the oldest are forgotten.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._label_of: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._label_of)

    def conflicts(self, x: Tensor, y: Tensor) -> Violation | None:
        """Rows whose content was seen with another label, in this batch or before; the first label seen stands."""
        rows = []
        for row, (content, label) in enumerate(zip(digests(x), digests(y), strict=True)):
            if self._label_of.setdefault(content, label) != label:
                rows.append(row)
            if len(self._label_of) > self.limit:
                del self._label_of[next(iter(self._label_of))]
        if not rows:
            return None
        text = "the same content was seen with another label"
        return Violation("conflicts", tuple(rows), f"{text}; labels here {_some(y.cpu()[rows])}")


def digests(x: Tensor) -> list[bytes]:
    """SHA-256 of the content of each row of ``x`` (B, ...): dtype, shape and bytes; equal where, and only where, rows
    are equal to the bit."""
    host = x.detach().cpu().contiguous()
    head = f"{host.dtype}{tuple(host.shape[1:])}".encode()
    columns = host.numel() // max(1, len(host))
    raw = host.reshape(len(host), columns).view(torch.uint8).numpy()
    return [hashlib.sha256(head + row.tobytes()).digest() for row in raw]


def extremes(x: Tensor, by_channel: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each row, NaN where there is one, in a single pass.

    Returns:
        Two tensors ``(B, 1)`` on the CPU, or ``(B, C)`` by the first dimension of a row; ``(B, 0)`` where a row holds
        no numbers.
    """
    if not x.numel():
        return torch.zeros(len(x), 0), torch.zeros(len(x), 0)
    x = torch.view_as_real(x) if x.is_complex() else x.to(torch.uint8) if x.dtype == torch.bool else x
    channels = x.shape[1] if by_channel and x.ndim > 1 else 1
    both = torch.stack(x.detach().reshape(len(x), channels, -1).aminmax(dim=2)).cpu()  # one wait for the device
    return both[0], both[1]


def _refuse_other_rows(x: Tensor, y: Tensor | None) -> None:
    if x.ndim == 0 or (y is not None and y.ndim == 0):
        raise ValueError("inputs and labels must have a first dimension that counts the rows of the batch")
    if y is not None and len(x) != len(y):
        raise ValueError(f"the inputs have {len(x)} rows and the labels {len(y)}")


def _kind(
    dtype_rule: str, shape_rule: str, dtype: str | None, shape: tuple[int | None, ...] | None, x: Tensor
) -> Iterator[Violation]:
    rows = tuple(range(len(x)))
    if dtype is not None and x.dtype != getattr(torch, dtype):
        yield Violation(dtype_rule, rows, f"{str(x.dtype).removeprefix('torch.')}, expected {dtype}")
    own = tuple(x.shape[1:])
    if shape is not None and (
        len(own) != len(shape) or any(b is not None and a != b for a, b in zip(own, shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        yield Violation(shape_rule, rows, f"rows of shape {own}, expected ({wanted})")


def _bound(bound: float | tuple[float, ...], like: Tensor, wider: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """In the precision of the data: what was within a bound before it was rounded to it is within afterwards.

    Double precision may hold what was single before, as with ``Trainer(precision="64-true")``.
    """
    exact = torch.tensor(bound, dtype=torch.float64).reshape(-1)
    if like.dtype == torch.float64:
        return wider(exact, exact.float().double())
    return exact.to(like.dtype) if like.is_floating_point() else exact


def _foreign(y: Tensor, classes: tuple[int, ...] | None) -> Tensor:
    """Which of the labels are none of the classes, or not finite."""
    if classes is None:
        return ~y.isfinite()
    if not y.is_floating_point():
        y = y.to(torch.int64)
    low, high = min(classes), max(classes)
    if high - low + 1 > len(classes) or y.is_floating_point():
        return ~torch.isin(y, torch.tensor(classes, device=y.device).to(y.dtype))
    return (y < low) | (y > high)


def _say(rule: str, schema: Schema, lows: Tensor, highs: Tensor, y: Tensor | None) -> str:
    """What is wrong with the rows whose extremes and labels are given."""
    if rule == "finite":
        return "NaN or infinite numbers"
    if rule == "constant":
        return f"all numbers of a row are equal; values {_some(lows.amin(1))}"
    if rule == "range":
        low, high = ("any" if bound is None else bound for bound in (schema.low, schema.high))
        return f"values from {float(lows.min()):g} to {float(highs.max()):g}, outside of [{low}, {high}]"
    if schema.classes is None or y is None:
        return "labels that are not finite"
    odd = y[_foreign(y, schema.classes)].unique()[:SHOWN].tolist()
    few = len(schema.classes) <= 20
    known = list(schema.classes) if few else f"the {len(schema.classes)} classes {schema.classes[0]}, …"
    return f"labels {odd} are none of {known}"


def _some(values: Tensor) -> str:
    return str([round(v, 6) if isinstance(v, float) else v for v in values[:SHOWN].tolist()])
