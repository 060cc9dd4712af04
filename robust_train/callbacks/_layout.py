"""Where inputs, labels and logits are in a step that was not written for a filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import Path, find_input, get, label_candidates, replaced
from robust_train.callbacks._callback import submodule
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepVictim, find_logits
from robust_train.evasion.victim import as_logits


@dataclass(frozen=True)
class Places:
    """What the user said of where things are.

    Attributes:
        loader: where the filtered loader's part lies in a batch of several loaders; empty for one loader.
        inputs: see ``find_input``.
        labels: see ``label_candidates``.
        logits: name of the submodule that returns the logits.
        features: name of the submodule whose input are the features.
    """

    loader: Path = ()
    inputs: str | int | None = None
    labels: str | int | None = None
    logits: str | None = None
    features: str | None = None


def scores_of(logits: Tensor) -> Tensor:
    """Logits ``(B, classes)``, float32; where a model has one score an example, the other class has 0."""
    if logits.numel() == len(logits):
        logits = logits.reshape(-1, 1)
        return torch.cat([torch.zeros_like(logits), logits], 1).float()
    return as_logits(logits.float())


def find_layout(trainer: Any, step: Callable[..., Any], batch: Any, places: Places) -> tuple[Layout, int]:
    """Where input, labels and logits are, and the number of classes.

    Raises:
        ValueError: the task is no classification of whole examples, or they were not found; says what to set.
    """
    module = trainer.lightning_module
    part = get(batch, places.loader)
    input_path = find_input(part, places.inputs)
    candidates = tuple((*places.loader, *p) for p in label_candidates(part, input_path, places.labels))
    input_path = (*places.loader, *input_path)
    layout = Layout(input_path, candidates[0] if candidates else None, candidates=candidates)
    arguments = _seams.step_arguments(step, 0, 0)
    columns = [p for p in candidates if _is_column(get(batch, p))]
    flat = batch
    for path in columns:
        flat = replaced(flat, path, get(batch, path)[:, 0])

    def with_columns(batch: Any) -> Any:
        for path in columns:
            batch = replaced(batch, path, get(batch, path)[:, None])
        return step(batch, *arguments)

    def victim(layout: Layout) -> StepVictim:
        sandbox = Sandbox(module, trainer, get(batch, input_path).device)
        return StepVictim(module, with_columns, flat, layout, sandbox, own_loss=False)

    named = None if places.logits is None else submodule(module, places.logits)
    with torch.enable_grad():
        found = find_logits(victim(layout), module, named)
        if found is None or found.labels_path is None:
            raise ValueError(
                "DataFilter found no logits that fit labels in the training step: its filters judge labels of a "
                'classification. Name the submodule that returns the logits with logits="…" and the labels with '
                'labels="…". For another task use DataFilter(predicate=…), which looks at one example at a time'
            )
        labels = get(flat, found.labels_path)
        if labels.numel() != len(labels):
            raise ValueError(
                f"DataFilter judges one class an example, and the labels have shape {tuple(labels.shape)}: for dense, "
                "soft or several labels use DataFilter(predicate=…), which looks at one example at a time"
            )
        return found, scores_of(victim(found).logits(get(batch, input_path))).shape[1]


def _is_column(labels: Tensor) -> bool:
    """Class indices ``(B, 1)``, which the user's step makes ``(B,)``."""
    return labels.ndim == 2 and labels.shape[1] == 1 and not labels.is_floating_point()
