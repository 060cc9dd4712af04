"""The loss of each single example, through the user's own step: what audits look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, fresh, get, label_candidates
from robust_train.callbacks._callback import submodule
from robust_train.callbacks._layout import Places, scores_of
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, find_logits, loss_of
from robust_train.evasion.randomness import preserved_rng, seed_global_rng
from robust_train.evasion.victim import classification_loss

CHECKED_BATCHES, CHECKED_ROWS = 3, 8  # on how much the ways to a loss are compared
TOLERANCE = 1e-3
NO_LOSS = (
    "the training step gives no loss for a batch of one example, so that nothing can be said about single examples: "
    "return the loss of every batch from training_step"
)


@dataclass(frozen=True)
class Way:
    """How a module's losses are read; the same for it and for its reference models.

    Attributes:
        batched: from the logits of whole batches, which were found to give the step's own losses; otherwise the step is
            called on one example at a time.
        additive: the step's loss of a batch is the mean or the sum of its examples' losses.
        layout: where inputs and labels are in a batch; ``logits_module`` is None.
        logits: name of the submodule that returns the logits, ``""`` for the module itself; None where there are none.
        seconds: that an example takes alone.
        seconds_batched: in a batch; None where there are no logits.
    """

    batched: bool
    additive: bool
    layout: Layout
    logits: str | None
    seconds: float
    seconds_batched: float | None = None

    def __str__(self) -> str:
        how = "the logits of whole batches, which give its own losses" if self.batched else "one example at a time"
        return f"training_step in eval mode, by {how}"


class LossReader:
    """Reads losses of a dataset's rows under a module.

    Args:
        trainer: whose precision, device and batch transfer are used.
        module: on the Trainer's device, and attached to it. Its parameters and its state are as before afterwards.
        collate: makes a batch of samples.
        places: what the user said of where inputs, labels and logits are.
        batch_size: rows at a time, where a batch's losses can be read at once.
    """

    def __init__(
        self, trainer: Any, module: Any, collate: Callable[[list[Any]], Any], places: Places, batch_size: int = 256
    ) -> None:
        self._trainer, self._module, self._collate, self._places = trainer, module, collate, places
        self._batch_size = batch_size
        self._step = _seams.own_step(module)
        self._arguments = _seams.step_arguments(self._step, 0, 0)

    def find_way(self, dataset: Any) -> Way:
        """Compare the ways to a loss on a few batches, and take the faster one that gives the step's own losses.

        Args:
            dataset: map-style; rows are taken evenly over it.

        Raises:
            ValueError: the step gives no loss for a single example, or one that is not finite; or what ``places`` names
                is not there.
        """
        rows = np.linspace(0, len(dataset) - 1, min(len(dataset), CHECKED_BATCHES * CHECKED_ROWS)).round()
        with preserved_rng(self._module.device):
            seed_global_rng(0)
            samples = [dataset[int(row)] for row in rows]
        found, name = self._find_layout(self._batch(samples[:CHECKED_ROWS]))
        way = Way(False, True, found, name, 0.0)
        clock = time.perf_counter()
        alone = self.losses(samples, way)
        each = (time.perf_counter() - clock) / len(samples)
        parts = [alone[i : i + CHECKED_ROWS] for i in range(0, len(alone), CHECKED_ROWS)]
        whole = self._together(samples)
        additive = _close(whole, [part.mean() for part in parts]) or _close(whole, [part.sum() for part in parts])
        way = replace(way, additive=additive, seconds=each)
        if name is None:
            return way
        clock = time.perf_counter()
        batched = self.losses(samples, replace(way, batched=True))
        together = (time.perf_counter() - clock) / len(samples)
        return replace(way, batched=_close(batched, alone) and together < each, seconds_batched=together)

    def losses(self, dataset: Any, way: Way) -> np.ndarray:
        """The loss of each row.

        Args:
            dataset: map-style, with N rows. What it draws at random (augmentation) is the same in every call.
            way: from ``find_way``, of this module or of one of the same class.

        Returns:
            float64 ``(N,)``.

        Raises:
            ValueError: a loss is not finite.
        """

        def read(batch: Any) -> Tensor:
            if not way.batched:
                return self._own_loss(batch)
            return classification_loss(self._logits(batch, way), get(batch, way.layout.labels_path or ()))

        found = torch.cat(self._each(dataset, self._batch_size if way.batched else 1, read)).numpy()
        if (strange := np.flatnonzero(~np.isfinite(found))).size:
            raise ValueError(
                f"the loss of {strange.size} of {len(found)} examples is not finite (the first is row {strange[0]}): "
                "look for NaN and inf in the data and in the weights"
            )
        return found

    def log_probabilities(self, dataset: Any, way: Way) -> tuple[Tensor, Tensor]:
        """What a classifier answers.

        Args:
            dataset: as for ``losses``.
            way: from ``find_way``.

        Returns:
            Log-probabilities, float64 ``(N, classes)``, and labels, int64 ``(N,)``, on the CPU.

        Raises:
            ValueError: the task has no logits with one class an example.
        """

        def read(batch: Any) -> Tensor:
            logits, labels = self._logits(batch, way), get(batch, way.layout.labels_path or ())
            scores = scores_of(logits)
            if labels.is_floating_point() or labels.numel() != len(labels) or scores.ndim != 2:
                raise ValueError("outputs can be perturbed of a classifier with one class an example only")
            return torch.cat([scores.double().log_softmax(1), labels.reshape(-1, 1).double()], 1)

        if way.logits is None:
            raise ValueError("outputs can be perturbed of a classifier only: no logits were found in the training step")
        found = torch.cat(self._each(dataset, self._batch_size, read))
        return found[:, :-1], found[:, -1].long()

    # --- work -----------------------------------------------------------------------------------------------------

    def _each(self, dataset: Any, size: int, read: Callable[[Any], Tensor]) -> list[Tensor]:
        """``read(batch)`` of all batches, float64 on the CPU."""
        with self._extra_calls() as call, preserved_rng(self._module.device):
            seed_global_rng(0)
            return [call(lambda batch=batch: read(batch)).detach().double().cpu() for batch in self._in(dataset, size)]

    def _in(self, dataset: Any, size: int) -> Iterator[Any]:
        for begin in range(0, len(dataset), size):
            yield self._batch([dataset[i] for i in range(begin, min(begin + size, len(dataset)))])

    def _batch(self, samples: list[Any]) -> Any:
        return _seams.transferred(self._trainer, self._collate(samples))

    @contextmanager
    def _extra_calls(self) -> Iterator[Callable[[Callable[[], Any]], Any]]:
        """What runs a call of the step that leaves no trace, in eval mode and at the Trainer's precision."""
        sandbox = Sandbox(self._module, self._trainer, self._module.device)
        # steps may differentiate on their own (gradient penalties), and Lightning's evaluation forbids it
        free = torch.inference_mode(False), torch.enable_grad()
        with free[0], free[1], _seams.autocast_context(self._trainer, "validation"), sandbox.opened("eval"):
            yield sandbox.call

    def _own_loss(self, batch: Any) -> Tensor:
        """Of a batch, as the step says, ``(1,)``."""
        with _seams.backpropagated(self._module) as handed:
            output = self._step(fresh(batch), *self._arguments)
        if handed:  # manual optimization: all that the step backpropagates
            return torch.stack([loss.detach().reshape(()) for loss in handed]).sum().reshape(1)
        loss = loss_of(output)
        if loss is None:
            raise ValueError(NO_LOSS)
        return loss.reshape(1)

    def _together(self, samples: list[Any]) -> np.ndarray:
        """The step's losses of a few whole batches."""
        return torch.cat(self._each(samples, CHECKED_ROWS, self._own_loss)).numpy()

    def _logits(self, batch: Any, way: Way) -> Tensor:
        def cut(logits: Tensor) -> None:
            raise _seams.LogitsReached(logits)

        layout = replace(way.layout, logits_module=self._module.get_submodule(way.logits or ""))
        try:
            with torch.no_grad(), layout.watched(cut), _seams.backpropagated(self._module):
                self._step(fresh(batch), *self._arguments)
        except _seams.LogitsReached as reached:
            return reached.logits
        raise ValueError("the training step returned before it had computed the logits of a batch")

    def _find_layout(self, batch: Any) -> tuple[Layout, str | None]:
        """Where things are, and the name of the submodule that returns the logits."""
        places = self._places
        path = find_input(batch, places.inputs)
        candidates = label_candidates(batch, path, places.labels)
        layout = Layout(path, candidates[0] if candidates else None, candidates=candidates)
        named = None if places.logits is None else submodule(self._module, places.logits)
        sandbox = Sandbox(self._module, self._trainer, self._module.device)
        victim = StepVictim(
            self._module, lambda b: self._step(b, *self._arguments), batch, layout, sandbox, own_loss=False
        )
        try:
            with torch.inference_mode(False), torch.enable_grad():
                found = find_logits(victim, self._module, named)
        except StepSkipped:
            raise ValueError(NO_LOSS) from None
        if found is None or found.logits_module is None or found.labels_path is None:
            return layout, None
        names = {part: name for name, part in self._module.named_modules()}
        return replace(found, logits_module=None), names.get(found.logits_module)


def _close(found: np.ndarray, expected: Iterable[float]) -> bool:
    return bool(np.allclose(found, np.array(list(expected)), rtol=TOLERANCE, atol=TOLERANCE / 10))
