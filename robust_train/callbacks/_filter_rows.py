"""Rows that a filter must not touch: those that the user trusts, and one that a batch cannot do without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._filtering import Judged


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


def trusted_rows(trainer: Any, trusted: Any, most: int | None, size: int) -> dict[str, Any]:
    """Arguments of ``Judge`` for what the user trusts.

    Args:
        trainer: the outer Trainer.
        trusted: a dataset, numbers of rows, ``"val"`` or None.
        most: how many of them are taken, or None.
        size: number of rows of the training data.

    Raises:
        ValueError: there are no such rows, or fewer than two.
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
        return {"trusted": trusted if most is None else Subset(trusted, list(range(min(most, count))))}
    rows = np.asarray(trusted)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(np.unique(rows)) < max(len(rows), 2):
        raise ValueError(
            f"data_filter.trusted must be a dataset or different row numbers, 2 at least, got {trusted!r:.80}"
        )
    if rows.min() < 0 or rows.max() >= size:
        raise ValueError(f"data_filter.trusted must be row numbers below {size}, got {rows.min()} to {rows.max()}")
    return {"trusted_rows": rows[:most].astype(np.int64)}
