"""What data validation cannot be given or combined with, each with the reason and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from robust_train.callbacks import _seams
from robust_train.callbacks._checks import check_counts, check_name, check_places, check_switches, check_texts
from robust_train.custody.manifest import Manifest
from robust_train.poisoning.schema import JOINT_RULES, RULES, Schema

MODES = ("strict", "quarantine")


def check_settings(validation: Any) -> None:
    """What DataValidation was given.

    Raises:
        ValueError: a setting is out of range, or contradicts another.
    """
    counts = {name: getattr(validation, name) for name in ("infer_batches", "remember_rows")}
    check_counts("data_validation", 1, **counts)
    check_switches("data_validation", check_val=validation.check_val)
    check_places("data_validation", inputs=validation.inputs, labels=validation.labels)
    check_texts("data_validation", manifest=validation.manifest)
    check_name("data_validation", validation.name)
    if validation.mode not in MODES:
        raise ValueError(f"data_validation.mode must be one of {', '.join(MODES)}, got {validation.mode!r}")
    unknown = [rule for rule in validation.skip if rule not in RULES]
    if unknown:
        raise ValueError(f"data_validation.skip must be a list of rules out of {', '.join(RULES)}, got {unknown!r}")
    if not isinstance(validation.schema, (Schema, str, Path)):
        raise ValueError(f"data_validation.schema must be a path, a Schema or 'infer', got {validation.schema!r}")
    trusted = validation.trusted
    if trusted is not None and (isinstance(trusted, (str, Mapping)) or not _is_iterable(trusted)):
        raise ValueError(f"data_validation.trusted must be a dataset, a loader or a list of batches, got {trusted!r}")
    if validation.trusted is not None and validation.schema != "infer":
        raise ValueError('data_validation.trusted is what a schema is inferred from: it needs schema="infer"')


def _is_iterable(value: Any) -> bool:
    return any(callable(getattr(type(value), name, None)) for name in ("__iter__", "__getitem__"))


def refuse_what_cannot_work(trainer: Any, module: Any, validation: Any, schema: Schema | None) -> None:
    """Before anything is trained.

    Args:
        trainer: the user's.
        module: the user's.
        validation: the callback.
        schema: as far as it is known.

    Raises:
        ValueError: a setting cannot be combined with DataValidation; the message names it and the way out.
    """
    for reason in _reasons(trainer, module, validation, schema):
        raise ValueError(reason)


def _reasons(trainer: Any, module: Any, validation: Any, schema: Schema | None) -> Iterator[str]:
    same = [c for c in trainer.callbacks if isinstance(c, type(validation)) and c.name == validation.name]
    if len(same) > 1:
        yield (
            f"two DataValidation callbacks with name={validation.name!r} would write the same files and metrics: keep "
            "one, or give each a name of its own"
        )
    if _seams.takes_iterator(module):
        yield (
            "DataValidation cannot see the batch of a training_step(self, dataloader_iter): take "
            "training_step(self, batch, batch_idx) instead"
        )
    # by name: privacy is not loaded for a run that does without it
    if any(cls.__name__ == "DPSGD" for c in trainer.callbacks for cls in type(c).__mro__):
        yield from _against_privacy(validation, schema)


def _against_privacy(validation: Any, schema: Schema | None) -> Iterator[str]:
    if validation.mode == "quarantine":
        yield (
            'DataValidation(mode="quarantine") cannot work with DPSGD: leaving rows out of a batch changes the '
            'sampling that epsilon is computed from. Use mode="strict", which names the rows, and remove them from the '
            "dataset"
        )
    if validation.schema == "infer" and validation.trusted is None:
        yield (
            'DataValidation(schema="infer") cannot work with DPSGD: the schema would publish values of private rows '
            "without noise. Give trusted=… (public data), or schema=… that was written by hand"
        )
    active = {
        "balance": schema is None or schema.shares is not None,
        "conflicts": schema is None or not schema.conflicting_labels,
    }
    joint = [rule for rule in JOINT_RULES if active[rule] and rule not in validation.skip]
    if joint:
        yield (
            f"DataValidation's rules {' and '.join(joint)} cannot work with DPSGD: they look at rows together, so that "
            f"one example decides over others. Switch them off with skip={joint}"
        )


def with_shares_of(schema: Schema, manifest: str | Path) -> Schema:
    """The schema with the classes and class shares that a data manifest counted.

    Raises:
        ValueError: the manifest cannot be read, or counted no classes, or its classes are no whole numbers.
    """
    counts = Manifest.read(manifest).classes
    if not counts or not all(name.isdecimal() for name in counts):
        raise ValueError(
            f"data_validation.manifest={str(manifest)!r} has no counts of classes with whole numbers: write it with "
            "robust-train manifest, from data with labels"
        )
    total = sum(counts.values())
    order = sorted(counts, key=int)
    return replace(schema, classes=tuple(map(int, order)), shares=tuple(counts[name] / total for name in order))
