"""Rows as the user gives them: what a predicate says of them, their labels, those trusted, one that must stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, get, label_candidates
from robust_train.callbacks._filter_refusals import described
from robust_train.callbacks._filtering import Judged
from robust_train.callbacks._observer import Places
from robust_train.poisoning.records import MOST_CLASSES


def spare_a_row(judged: Judged, loader: DataLoader[Any], trainer: Any) -> None:
    """Keep one row more where the last batch of an epoch would be a single row, and was not before.

    Batch normalisation stops with an error there. The row is the one that the fewest filters flag.
    """
    outcome, size, n = judged.outcome, loader.batch_size, len(judged.labels)
    light = outcome.touched & ~judged.refused
    share = -(-np.array([n, n - int(outcome.touched.sum())]) // trainer.world_size)  # of a process
    normalised = any(isinstance(m, _BatchNorm) for m in trainer.lightning_module.modules())
    if not normalised or loader.drop_last or size is None or size < 2 or not light.any():
        return
    if share[0] % size != 1 and share[1] % size == 1 and share[1] > size:
        flags = np.sum([column.flagged for column in judged.columns], axis=0)
        row = int(np.flatnonzero(light)[flags[light].argmin()])
        outcome.touched[row], outcome.capped[row] = False, True
        note = (
            f"Row {row} is kept, though flagged, so that no batch has a single row, which batch normalisation cannot "
            "learn from: drop_last=True in the train loader lets it be left out."
        )
        outcome.notes.append(note)
        rank_zero_info(f"DataFilter: {note}")


def refused_rows(
    dataset: Any, predicate: Callable[[Any], bool], places: Places
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a predicate refuses, and the labels, from one pass over the examples.

    Args:
        dataset: map-style, N rows.
        predicate: told one example, says whether to keep it.
        places: where input and labels are.

    Returns:
        bool ``(N,)``, and int64 ``(N,)``; None in place of the labels where an example has no class index at the place
        where labels are looked for in a batch, or where those differ in every row, as row numbers do.
    """
    refused, labels, path = np.zeros(len(dataset), dtype=bool), np.full(len(dataset), -1), None
    for row in range(len(dataset)):
        example = dataset[row]
        refused[row] = not predicate(example)
        try:
            batch = tree_map(_batch_of_one, example)
            if path is None:
                candidates = label_candidates(batch, find_input(batch, places.inputs), places.labels)
                path = candidates[0] if candidates else None
            label = None if path is None else get(batch, path)
        except (ValueError, LookupError, AttributeError, TypeError):  # an example of another form than most, or none
            continue
        if isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point():
            labels[row] = label.item()
    known = labels.min() >= 0 and labels.max() < MOST_CLASSES and len(np.unique(labels)) < len(labels)
    return refused, labels if known else None


def _batch_of_one(part: Any) -> Any:
    """Numbers, arrays and tensors with a first dimension of one example; all else as it is."""
    if isinstance(part, (bool, int, float, np.ndarray, np.generic)) and np.asarray(part).dtype.kind in "biuf":
        part = torch.from_numpy(np.array(part))
    return part[None] if isinstance(part, Tensor) else part


def trusted_rows(trainer: Any, trusted: Any, most: int | None, loader: DataLoader[Any]) -> dict[str, Any]:
    """Arguments of ``Judge`` for what the user trusts.

    Args:
        trainer: the outer Trainer.
        trusted: a dataset, numbers of rows, ``"val"`` or None.
        most: how many of them are taken, or None.
        loader: of the training data.

    Raises:
        ValueError: there are no such rows, or fewer than two, or they make no batch together with the training rows.
    """
    if trusted is None:
        return {}
    if isinstance(trusted, str):
        trusted = _seams.validation_dataset(trainer)
        if trusted is None:
            raise ValueError("data_filter.trusted='val', and the run has no validation data: give a dataset")
    if not isinstance(trusted, (Sequence, np.ndarray, Tensor)):
        count = 0 if isinstance(trusted, IterableDataset) else len(trusted)
        if count < 2:
            raise ValueError(f"data_filter.trusted must have rows by number, 2 at least; {trusted!r:.80} has {count}")
        if loader.batch_sampler is None:
            raise ValueError(
                "data_filter.trusted cannot be a dataset where the train loader has batch_size=None and asks its own "
                "for several rows at once: put the trusted rows into the training data, and give their numbers"
            )
        _check_fits(loader, trusted[0])
        return {"trusted": trusted if most is None else Subset(trusted, list(range(min(most, count))))}
    rows = np.asarray(trusted)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(np.unique(rows)) < max(len(rows), 2):
        raise ValueError(
            f"data_filter.trusted must be a dataset or different row numbers, 2 at least, got {trusted!r:.80}"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    if rows.min() < 0 or rows.max() >= size:
        raise ValueError(f"data_filter.trusted must be row numbers below {size}, got {rows.min()} to {rows.max()}")
    return {"trusted_rows": rows[:most].astype(np.int64)}


def _check_fits(loader: DataLoader[Any], example: Any) -> None:
    """Refuse a trusted example that makes no batch with a training row, whatever the user's collate function takes."""
    own = loader.dataset[0]
    try:
        for pair in ([own, example], [example, own]):
            loader.collate_fn(pair)
    except Exception as error:
        raise ValueError(
            f"data_filter.trusted must have rows like the training data's, {described(own)}, and has "
            f"{described(example)}: they make no batch together ({' '.join(str(error).split()):.200})"
        ) from error
