"""What a nested run shows of the training rows: labels, logits, features, and how they were learned."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import fresh, get, replaced, write_back
from robust_train.callbacks._callback import Callback, submodule
from robust_train.callbacks._filter_refusals import described
from robust_train.callbacks._layout import Places, find_layout, scores_of
from robust_train.callbacks._recorder import Recorder
from robust_train.callbacks._seams import LogitsReached, backpropagated, on_call, silenced, uncompiled_modules
from robust_train.callbacks._step import Layout

if TYPE_CHECKING:
    import pytorch_lightning as pl

IN_MEMORY = 2**28  # bytes of float32; larger tables are kept as float16 in a temporary file


@dataclass
class Observed:
    """What was seen of M rows, in their order.

    Attributes:
        labels: int64 ``(M,)``.
        logits: float32 ``(M, classes)``.
        features: ``(M, D)``, None unless asked for.
        inputs: ``(M, ...)``, None unless asked for.
        margins: ``(epochs, M)`` of the training, of the label that was trained on; NaN where a row was not drawn.
        losses: likewise.
    """

    labels: Tensor
    logits: Tensor
    features: Tensor | None = None
    inputs: Tensor | None = None
    margins: Tensor | None = None
    losses: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.logits.shape[1]


@dataclass
class WrongLabels:
    """Label canaries: rows that are given a wrong label for the time of a probe.

    Attributes:
        rows: bool ``(M,)``.
        draws: uniform in [0, 1), ``(M,)``: which of the other classes.
    """

    rows: np.ndarray
    draws: np.ndarray

    @staticmethod
    def drawn(size: int, count: int, seed: int) -> WrongLabels:
        """``count`` of ``size`` rows."""
        generator = np.random.default_rng(seed)
        rows = np.zeros(size, dtype=bool)
        rows[generator.permutation(size)[:count]] = True
        return WrongLabels(rows, generator.random(size))

    def of(self, labels: Tensor, classes: int, rows: np.ndarray | None = None) -> Tensor:
        """The labels of ``rows`` (None: all) with the canaries' wrong ones, each uniform over the other classes."""
        here, draws = (self.rows, self.draws) if rows is None else (self.rows[rows], self.draws[rows])
        shift = torch.from_numpy(1 + (draws * (classes - 1)).astype(np.int64)).to(labels.device)
        wrong = ((labels.long() + shift) % classes).to(labels.dtype)
        return torch.where(torch.from_numpy(here).to(labels.device), wrong, labels)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, ``(B,)``."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)


class Observer(Callback):
    """Watches a nested run, and looks at every row once it is over.

    Args:
        everything: loader that yields all M rows once, in order.
        size: M.
        places: where things are in the user's batch.
        wanted: of ``"features"``, ``"inputs"`` and ``"dynamics"``.
        recorder: tells the rows of each training batch; needed for dynamics and wrong labels.
        wrong: canaries.
        around: puts a batch of the filtered loader into what the step expects, where there are several loaders.
        extractor: maps inputs to features, in place of the module's own.
        train: False: look at the rows with the weights as they are, and train nothing.
    """

    def __init__(
        self,
        everything: Any,
        size: int,
        places: Places,
        wanted: frozenset[str] = frozenset(),
        recorder: Recorder | None = None,
        wrong: WrongLabels | None = None,
        around: Callable[[Any], Any] = lambda batch: batch,
        extractor: nn.Module | None = None,
        train: bool = True,
    ) -> None:
        self._everything, self._size, self._places, self._wanted = everything, size, places, wanted
        self._recorder, self._wrong, self._around, self._extractor = recorder, wrong, around, extractor
        self._train, self._layout = train, None
        self._rows = np.empty(0, dtype=np.int64)
        self._seen: Tensor | None = None
        self._own_labels = torch.full((size,), -1)
        self._margins: list[Tensor] = []
        self._losses: list[Tensor] = []
        self.observed: Observed | None = None

    # --- while it trains ------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._own_step = pl_module.training_step
        self.unwrap = _seams.wrap_training_step(
            pl_module, lambda step, *args, **kwargs: self._step(trainer, step, args, kwargs)
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._margins.append(torch.full((self._size,), math.nan))
        self._losses.append(torch.full((self._size,), math.nan))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is not None:
            self._rows = self._recorder.pop()
        if not self._train and self.observed is None:  # as late as this: the module is ready for a step
            self._look_at_everything(trainer, pl_module)
            trainer.should_stop = True

    def _step(self, trainer: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._recorder is None:
            return step(*args, **kwargs)
        batch = kwargs["batch"] if "batch" in kwargs else args[0]
        layout = self._find(trainer, step, batch)
        path = layout.labels_path or ()
        labels, sent, given = self._labels(batch, layout), batch, None
        if len(labels) != len(self._rows):
            raise ValueError(
                f"DataFilter: a batch of {len(self._rows)} rows came out of the collate function with {len(labels)} "
                "labels, and which row is which is not known. Return every row"
            )
        self._own_labels[torch.from_numpy(self._rows)] = labels.long().cpu()
        if self._wrong is not None:
            labels = self._wrong.of(labels, self.classes, self._rows)
            given = labels.reshape(get(batch, path).shape)
            sent = replaced(batch, path, given)
        kwargs, args = ({**kwargs, "batch": sent}, args) if "batch" in kwargs else (kwargs, (sent, *args[1:]))
        self._seen = None
        with layout.watched(lambda logits: setattr(self, "_seen", logits.detach())):
            output = step(*args, **kwargs)
        if sent is not batch:
            write_back(batch, sent, path, given)
        if self._seen is not None and not self._seen.isfinite().all():  # before anything is learned from it
            self._refuse_strange_inputs(trainer, batch, layout)
        if self._seen is not None and "dynamics" in self._wanted:
            logits, rows, labels = scores_of(self._seen), torch.from_numpy(self._rows), labels.long()
            self._margins[-1][rows] = margin(logits, labels).cpu()
            self._losses[-1][rows] = cross_entropy(logits, labels, reduction="none").cpu()
        return output

    @property
    def epochs(self) -> int:
        """How many began."""
        return len(self._margins)

    @property
    def dynamics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Margins and losses ``(epochs, M)``, NaN where a row was not drawn; labels ``(M,)``, -1 where it never was."""
        return torch.stack(self._margins), torch.stack(self._losses), self._own_labels

    # --- once it is over, still on its device ---------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # before the module's own hook, in which it may put away what its step needs
        if self._train and trainer.current_epoch + 1 == trainer.max_epochs:
            self._look_at_everything(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.observed is None:  # the module stopped the run early
            self._look_at_everything(trainer, pl_module)

    def _look_at_everything(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._own_step
        tables: dict[str, Table] = {}
        modes = [(part, part.training) for part in pl_module.modules()]
        pl_module.eval()
        with (
            torch.no_grad(),
            silenced(pl_module, trainer),
            backpropagated(pl_module),
            _seams.autocast_context(trainer, "validation"),
        ):
            head: nn.Module | None = None
            # a copy: the user's stays where and as it is
            extractor = copy.deepcopy(self._extractor) if "features" in self._wanted else None
            if extractor is not None:
                extractor.to(pl_module.device).eval()
            done = 0
            for batch in self._everything:
                batch = _seams.transferred(trainer, self._around(batch))
                layout = self._find(trainer, step, batch)
                if head is None and "features" in self._wanted and extractor is None:
                    head = self._head(pl_module, layout, step, batch)
                labels, inputs = self._labels(batch, layout), get(batch, layout.input_path)
                features = None if extractor is None else extractor(inputs.clone()).flatten(1)
                logits, seen = self._look(step, batch, layout, head)
                found = {
                    "labels": labels,
                    "logits": scores_of(logits),
                    "features": seen if features is None else features,
                }
                found["inputs"] = inputs if "inputs" in self._wanted else None
                for name, values in found.items():
                    if values is not None:
                        tables.setdefault(name, Table(self._size)).write(done, values)
                done += len(labels)
        for part, training in modes:
            part.training = training
        if done != self._size:
            raise ValueError(
                f"DataFilter: the loader delivered {done} of {self._size} rows when each was asked for once, and every "
                "row must be seen. A collate function that drops rows, or a dataset whose length is wrong, does this"
            )
        if not torch.isfinite(tables["logits"].values).all():
            if self._layout is not None:
                self._refuse_strange_inputs(trainer, None, self._layout)
            raise ValueError(
                "DataFilter's copy of the module has logits that are not finite, though the inputs are: it diverged. "
                "Lower the learning rate, train it for fewer epochs with Probe(epochs=…), or give it weights that were "
                "trained before with Probe(checkpoint=…)"
            )
        dynamics = "dynamics" in self._wanted and self._train
        self.observed = Observed(
            labels=tables["labels"].values.long(),
            logits=tables["logits"].values.float(),
            features=tables["features"].values if "features" in tables else None,
            inputs=tables["inputs"].values if "inputs" in tables else None,
            margins=torch.stack(self._margins) if dynamics else None,
            losses=torch.stack(self._losses) if dynamics else None,
        )

    def _look(
        self, step: Callable[..., Any], batch: Any, layout: Layout, head: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and features of a batch; the step is left as soon as they are there."""
        kept: list[Tensor] = []

        def cut(logits: Tensor) -> None:
            raise LogitsReached(logits)

        with ExitStack() as stack:
            if head is not None:
                hook = head.register_forward_pre_hook(
                    lambda _, args, kwargs: kept.extend(_tensors((*args, *kwargs.values()))), with_kwargs=True
                )
                stack.callback(hook.remove)
            try:
                with layout.watched(cut):
                    step(fresh(batch), *_seams.step_arguments(step, 0, 0))
            except LogitsReached as reached:
                return reached.logits, kept[-1] if kept else None
        raise ValueError("DataFilter: the training step returned before it had computed the logits of a batch")

    def _refuse_strange_inputs(self, trainer: Any, batch: Any, layout: Layout) -> None:
        """Name the rows whose inputs are not finite, all that there are, where a batch (None: any) has such.

        Raises:
            ValueError: there are some.
        """
        here = None if batch is None else self._rows[_not_finite(get(batch, layout.input_path))].tolist()
        if here == []:
            return
        rows, done = list[int](), 0
        for other in self._everything or ():
            inputs = get(_seams.transferred(trainer, self._around(other)), layout.input_path)
            rows += [done + row for row in _not_finite(inputs)]
            done += len(inputs)
        if rows := rows or here:
            some = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
            raise ValueError(
                f"DataFilter: rows {some} have inputs that are not finite, and so have a model's logits of them. Mend "
                "these rows, or leave them out of the dataset, which DataFilter(predicate=…) without filters also does"
            )

    # --- where things are -----------------------------------------------------------------------------------------

    def _labels(self, batch: Any, layout: Layout) -> Tensor:
        """Labels as class indices, ``(B,)``.

        Raises:
            ValueError: one is none.
        """
        labels = get(batch, layout.labels_path or ()).flatten()
        if bool(((labels < 0) | (labels >= self.classes)).any()):
            strange = labels[(labels < 0) | (labels >= self.classes)][:3].tolist()
            raise ValueError(
                f"DataFilter: a batch has labels such as {strange}, and the module knows the classes 0 to "
                f"{self.classes - 1}: the class of every row must be known. Leave unlabelled rows out of the training "
                "data, or leave them to a filter of your own: DataFilter(predicate=…)"
            )
        return labels

    def _find(self, trainer: Any, step: Callable[..., Any], batch: Any) -> Layout:
        if self._layout is None:
            try:
                self._layout, self.classes = find_layout(trainer, step, batch, self._places)
            except ValueError as error:
                raise ValueError(f"{error}. A batch is {described(batch)}") from error
        return self._layout

    def _head(self, module: nn.Module, layout: Layout, step: Callable[..., Any], batch: Any) -> nn.Module:
        """The module whose input are the features: the first one whose output are the logits, or the last Linear.

        Raises:
            ValueError: there is none.
        """
        if self._places.features is not None:
            return submodule(module, self._places.features, "features")
        called: list[tuple[nn.Module, Tensor]] = []
        with ExitStack() as stack:
            for child in uncompiled_modules(module):
                if all(name == "parametrizations" for name, _ in child.named_children()):
                    stack.enter_context(on_call(child, lambda m, out: called.append((m, out))))
            logits, _ = self._look(step, batch, layout, None)
        same = [m for m, out in called if isinstance(out, Tensor) and torch.equal(out.flatten(), logits.flatten())]
        linear = [m for m, _ in called if isinstance(m, nn.Linear)]
        if not same and not linear:
            raise ValueError(
                "DataFilter found no layer that returns the logits, whose input the features would be: name a "
                'submodule whose input they are with features="…", or give Probe(extractor=…)'
            )
        return same[0] if same else linear[-1]


def _not_finite(inputs: Tensor) -> list[int]:
    """Which rows of a batch ``(B, ...)`` hold NaN or an infinity."""
    return (~inputs.isfinite().reshape(len(inputs), -1).all(1)).nonzero()[:, 0].tolist()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The first tensor of what a layer is called with, a row an example."""
    return [v.detach().flatten(1) for v in values if isinstance(v, Tensor) and v.ndim > 1][:1]


@dataclass
class Table:
    """Values of all rows: float32 in memory, or float16 in a temporary file when large.

    Attributes:
        size: number of rows.
    """

    size: int
    _values: Tensor | None = field(default=None, repr=False)

    def write(self, start: int, values: Tensor) -> None:
        """Rows from ``start`` on; what lies beyond the table is left for the caller to notice."""
        values = values.detach().cpu()
        if self._values is None:
            self._values = self._room(values)
        if values.shape[1:] != self._values.shape[1:]:
            raise ValueError(
                f"DataFilter: rows have different shapes, {tuple(values.shape[1:])} and "
                f"{tuple(self._values.shape[1:])}: filters that compare rows need equal ones; resize them in the "
                "dataset, or choose other filters"
            )
        end = min(start + len(values), self.size)
        self._values[start:end] = values[: max(0, end - start)].to(self._values.dtype)

    def _room(self, like: Tensor) -> Tensor:
        shape = (self.size, *like.shape[1:])
        if not like.is_floating_point() or math.prod(shape) * 4 <= IN_MEMORY:
            return torch.empty(shape, dtype=torch.float32 if like.is_floating_point() else like.dtype)
        with tempfile.NamedTemporaryFile(suffix=".f16") as file:  # unlinked at once: it lives as long as it is mapped
            return torch.from_numpy(np.memmap(file.name, np.float16, "w+", shape=shape))

    @property
    def values(self) -> Tensor:
        assert self._values is not None  # noqa: S101  (a table is made for the first values)
        return self._values
