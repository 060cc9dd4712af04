"""Commands that belong to a room, given what only the command line knows: where the data come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from robust_train.cli.compose import composed
from robust_train.cli.train import poison_of
from robust_train.config import build

SCHEMA_ROWS = 1024  # that a manifest's schema is inferred from


def privacy(argv: list[str]) -> None:
    from robust_train.privacy import command
    from robust_train.report import epsilon_chart

    command.main(argv, draw=epsilon_chart)


def manifest(argv: list[str]) -> None:
    from robust_train.custody import command

    command.manifest_main(argv, _training_data)


def verify(argv: list[str]) -> None:
    from robust_train.custody import command

    command.verify_main(argv, _training_data)


def quarantine(argv: list[str]) -> None:
    from robust_train.custody.digest import digest
    from robust_train.poisoning import command
    from robust_train.report._svg import png

    command.main(argv, load=_training_data, digest=digest, draw=png)


@dataclass(frozen=True)
class _TrainingData:
    """What the commands on data work with."""

    dataset: Any
    label_of: Callable[[Any], Any] | None
    schema: dict[str, Any] | None


def _training_data(overrides: list[str]) -> _TrainingData:
    """The training set that overrides such as ``data=fashion_mnist`` name."""
    from robust_train.callbacks._batch import find_input, get, label_candidates

    cfg = composed("train", overrides)
    data = build(cfg.data, allow=list(cfg.allow))
    data.prepare_data()
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    if (poison := poison_of(cfg)) is not None:
        from robust_train.poisoning.dataset import PoisonedDataset

        dataset = PoisonedDataset(dataset, poison, cfg.task.classes)
    sample = dataset[0]
    path = find_input(sample)
    places = label_candidates(sample, path)
    label_of = (lambda example: int(get(example, places[0]))) if places else None
    return _TrainingData(dataset, label_of, _schema(dataset, path, places))


def _schema(dataset: Any, path: Any, places: Any) -> dict[str, Any] | None:
    """What batches of the data look like, from rows that are spread evenly over them; None if they make up no batch."""
    import torch
    from torch.utils.data import default_collate

    from robust_train.callbacks._batch import get
    from robust_train.poisoning.infer import infer, observe

    rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), SCHEMA_ROWS)).round().long().tolist()
    observed = []
    for start in range(0, len(rows), 64):
        try:
            batch = default_collate([dataset[row] for row in rows[start : start + 64]])
            observed.append(observe(get(batch, path), get(batch, places[0]) if places else None))
        except (TypeError, ValueError, RuntimeError) as error:
            print(f"no schema is recorded, because rows do not make up a batch: {' '.join(str(error).split())[:200]}")
            return None
    return infer(observed, source=f"{len(rows)} rows").to_dict()
