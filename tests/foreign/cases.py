"""All foreign modules with data that fits them: what the callbacks' tests are parametrised over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
from foreign import batches, optimizing, stateful, tasks
from foreign.data import image_columns, loaders, table_columns

from robust_train import Threat

UNBOUNDED = {"low": -math.inf, "high": math.inf}


def images(as_batch: Callable[..., Any] | None = None) -> Callable[[], dict[str, Any]]:
    return lambda: loaders(image_columns, as_batch)


@dataclass(frozen=True)
class Case:
    """A third party's module.

    Attributes:
        module: makes one.
        data: makes the arguments of ``Trainer.fit``.
        where: the callbacks' ``inputs``, ``labels`` and ``logits``, where the module needs them.
        threat: arguments of ``Threat`` besides ``eps``.
        kind: what RobustEvaluation can measure: ``"acc"`` or ``"loss"``.
        trainer: the Trainer that the module was written for.
    """

    module: Callable[[], Any]
    data: Callable[[], dict[str, Any]] = field(default_factory=images)
    where: dict[str, Any] = field(default_factory=dict)
    threat: dict[str, Any] = field(default_factory=dict)
    kind: str = "acc"
    trainer: type = pl.Trainer

    def ball(self, eps: float) -> Threat:
        return Threat(eps=eps, **self.threat)


def reordered(table, image, y):
    return table, image, y


def image_and_table(n: int = 20, seed: int = 0):
    return table_columns(n, seed=seed)[0], *image_columns(n, seed)


CASES: dict[str, Case] = {
    "tuple": Case(batches.TupleBatch),
    "dict": Case(batches.DictBatch, images(batches.named_images)),
    "whole_dict": Case(batches.WholeDict, images(lambda x, y: {"labels": y, "pixel_values": x})),
    "dataclass": Case(batches.DataclassBatch, images(lambda x, y: batches.Sample(y, x))),
    "frozen_dataclass": Case(batches.DataclassBatch, images(lambda x, y: batches.FrozenSample(y, x))),
    "named_tuple": Case(batches.NamedTupleBatch, images(lambda x, y: batches.Pair(y, x))),
    "nested": Case(batches.NestedBatch, images(batches.two_views), {"inputs": "views.0"}),
    "transfer_hook": Case(batches.TupleBatch, lambda: {"datamodule": batches.BytesToFloats()}),
    "image_and_table": Case(batches.ImageAndTable, lambda: loaders(image_and_table), {"inputs": 1}),
    "mutates_batch": Case(batches.MutatesBatch, images(lambda x, y: {"x": x, "y": y})),
    "stashes_in_batch": Case(batches.StashesInBatch, images(lambda x, y: {"x": x, "y": y})),
    "gan": Case(optimizing.GAN, kind="loss"),
    "manual_accumulation": Case(optimizing.ManualAccumulation),
    "manual_closure": Case(optimizing.ManualClosure),
    "manual_skips": Case(optimizing.ManualSkips),
    "second_order": Case(optimizing.SecondOrder),
    "returns_dict": Case(optimizing.ReturnsDict),
    "skips_batches": Case(optimizing.SkipsBatches),
    "clips_its_weights": Case(optimizing.ClipsItsWeights),
    "grouped_schedule": Case(optimizing.GroupedSchedule),
    "segmentation": Case(tasks.Segmentation, lambda: loaders(tasks.masks)),
    "tabular": Case(tasks.Tabular, lambda: loaders(table_columns), threat=UNBOUNDED),
    "tabular_binary": Case(tasks.TabularBinary, lambda: loaders(tasks.binary_table), threat=UNBOUNDED),
    "regression": Case(tasks.Regression, lambda: loaders(tasks.two_numbers), threat=UNBOUNDED, kind="loss"),
    "soft_labels": Case(tasks.SoftLabels, lambda: loaders(tasks.distributions)),
    "normalises_inside": Case(tasks.NormalisesInside),
    "encoder_and_head": Case(tasks.EncoderAndHead),
    "returns_object": Case(tasks.ReturnsObject),
    "frozen_backbone": Case(tasks.FrozenBackbone),
    "gradient_penalty": Case(tasks.GradientPenalty),
    "checkpointed": Case(tasks.Checkpointed),
    "recurrent": Case(tasks.Recurrent, where={"logits": "net"}),
    "nasty": Case(stateful.Nasty),
    "metrics": Case(stateful.WithMetrics),
    "momentum_teacher": Case(stateful.MomentumTeacher),
    "teacher_through_data": Case(stateful.TeacherThroughData),
    "teacher_every_second_batch": Case(stateful.TeacherEverySecondBatch),
    "hidden_teacher": Case(stateful.HiddenTeacher),
    "queue": Case(stateful.Queue),
    "bookkeeper": Case(stateful.Bookkeeper),
    "numpy_confusion": Case(stateful.NumpyConfusion),
    "tuple_of_tensors": Case(stateful.TupleOfTensors),
    "slotted": Case(stateful.Slotted),
    "holds_iterator": Case(stateful.HoldsIterator),
    "lazy_buffer": Case(stateful.LazyBuffer),
    "lazy_validation": Case(stateful.LazyValidation),
    "writes_to_logger": Case(stateful.WritesToLogger),
    "reads_logger": Case(stateful.ReadsLogger),
    "old_spectral_norm": Case(stateful.OldSpectralNorm),
    "unified": Case(stateful.Unified, trainer=unified.Trainer),
    "compiled_inside": Case(tasks.CompiledInside),
}

SLOW = {"compiled_inside"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
