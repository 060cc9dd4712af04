"""What rows of training data must look like: plain numbers, kept in a yaml file beside the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml

FORMAT = {"schema": "robust_train/data_schema", "version": 1}
RULES = (
    "dtype",
    "shape",
    "finite",
    "range",
    "constant",
    "label_dtype",
    "label_shape",
    "labels",
    "balance",
    "conflicts",
)
JOINT_RULES = ("balance", "conflicts")  # look at rows together; the others judge each row alone


@dataclass(frozen=True)
class Schema:
    """What rows must look like. A field that is None, or says that everything may occur, checks nothing.

    Args:
        dtype: of the inputs, by torch's name (``"float32"``).
        shape: of one row, without the batch dimension; None in place of a size that is free.
        low: smallest value that may occur; or one for each index of a row's first dimension (channel, feature).
        high: the largest one, likewise.
        finite: NaN and infinities must not occur in the inputs.
        constant_rows: rows whose numbers are all equal may occur.
        label_dtype: as ``dtype``.
        label_shape: as ``shape``; ``()`` for one number a row.
        classes: all values that labels may have; a whole number n means 0 to n - 1. None: any finite value.
        shares: expected share of each of ``classes`` among the rows, summing to 1.
        share_tolerance: how far a class's true share may be from the expected one.
        conflicting_labels: rows of equal content may have different labels.
        source: where the schema comes from, in a sentence.

    Raises:
        ValueError: a field is out of range, or contradicts another.
    """

    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    finite: bool = True
    constant_rows: bool = True
    label_dtype: str | None = None
    label_shape: tuple[int | None, ...] | None = None
    classes: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None
    share_tolerance: float = 0.05
    conflicting_labels: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        if _whole(self.classes):
            object.__setattr__(self, "classes", tuple(range(self.classes)))  # pyright: ignore[reportArgumentType]
        for name in ("shape", "low", "high", "label_shape", "classes", "shares"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name in ("dtype", "label_dtype"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
            ):
                raise ValueError(f"schema.{name} must be a dtype of torch such as 'float32', got {value!r}")
        for name in ("shape", "label_shape"):
            value = getattr(self, name)
            if value is not None and not _all(value, lambda size: size is None or (_whole(size) and size >= 0)):
                raise ValueError(f"schema.{name} must be a list of sizes, null for a free one, got {value!r}")
        for name in ("finite", "constant_rows", "conflicting_labels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"schema.{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.source, str):
            raise ValueError(f"schema.source must be text, got {self.source!r}")
        self._check_range()
        self._check_classes()

    def _check_range(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None and not _number(value) and not (_all(value, _number) and value):
                raise ValueError(f"schema.{name} must be a number or a list of numbers, got {value!r}")
            if isinstance(value, tuple) and (not self.shape or self.shape[0] != len(value)):
                raise ValueError(
                    f"schema.{name} has {len(value)} values, one for each index of a row's first dimension, and "
                    f"schema.shape is {self.shape!r}"
                )
        if self.low is None or self.high is None:
            return
        lows, highs = _tuple(self.low), _tuple(self.high)
        if len(lows) != len(highs) and 1 not in (len(lows), len(highs)):
            raise ValueError(f"schema.low has {len(lows)} values and schema.high {len(highs)}: give equally many")
        n = max(len(lows), len(highs))
        for low, high in zip(lows * (n // len(lows)), highs * (n // len(highs)), strict=True):
            if low > high:
                raise ValueError(f"schema.low must not exceed schema.high, got {low!r} and {high!r}")

    def _check_classes(self) -> None:
        if self.classes is not None and (
            not _all(self.classes, _whole) or not self.classes or len(set(self.classes)) < len(self.classes)
        ):
            raise ValueError(f"schema.classes must be a number of classes or a list of labels, got {self.classes!r}")
        if not (_number(self.share_tolerance) and 0 <= self.share_tolerance <= 1):
            raise ValueError(f"schema.share_tolerance must be in [0, 1], got {self.share_tolerance!r}")
        if self.shares is None:
            return
        if not _all(self.shares, lambda share: _number(share) and share >= 0) or abs(sum(self.shares) - 1) > 1e-3:
            raise ValueError(f"schema.shares must be shares >= 0 that sum to 1, got {self.shares!r}")
        if self.classes is None or len(self.classes) != len(self.shares):
            raise ValueError(
                f"schema.shares has {len(self.shares)} values, which must be one for each of schema.classes"
            )

    # --- words and yaml -------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """In a line: ``float32 (1, 8, 8) in [0, 1]; 10 classes``."""
        words = [self.dtype or "any dtype"]
        if self.shape is not None:
            words.append(f"({', '.join('any' if size is None else str(size) for size in self.shape)})")
        if self.low is not None or self.high is not None:
            low, high = (
                "any" if b is None else f"{b:g}" if _number(b) else "by channel" for b in (self.low, self.high)
            )
            words.append(f"in [{low}, {high}]")
        labels = "any labels" if self.classes is None else f"{len(self.classes)} classes"
        return f"{' '.join(words)}; {labels}"

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins: what the file holds."""
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**FORMAT, **own}

    @classmethod
    def from_dict(cls, state: Any) -> Schema:
        """A schema from what ``to_dict`` returned, or from some of its fields.

        Raises:
            ValueError: it is no mapping, has a field that a schema has not, or a value that does not fit.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"a data schema must be a mapping of fields, got {state!r:.80}")
        for name, wanted in FORMAT.items():
            if state.get(name, wanted) != wanted:
                raise ValueError(f"{name} must be {wanted!r}, got {state[name]!r:.80}")
        known = [f.name for f in fields(cls)]
        for name in state:
            if name not in (*known, *FORMAT):
                close = get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"a data schema has no field {name!r}{hint}; it has: {', '.join(known)}")
        return cls(**{name: state[name] for name in known if name in state})

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all: no reader ever sees half of it."""
        path = Path(path)
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> Schema:
        """A schema from its file.

        Raises:
            ValueError: the file cannot be read, is no yaml, or no schema; one line that names the file.
        """
        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:  # bad UTF-8 is a ValueError too
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _all(values: Any, fits: Any) -> bool:
    return isinstance(values, tuple) and all(map(fits, values))


def _tuple(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
