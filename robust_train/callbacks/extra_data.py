"""Unlabelled data with pseudo-labels, mixed into every training batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import Path, _tensors, find_input, get, label_candidates, replaced
from robust_train.callbacks._callback import Callback, place_text, plain, submodule
from robust_train.callbacks._checks import check_counts, check_places, check_texts, refuse_beside
from robust_train.callbacks._helper import as_helper, learned_weights, loaded_weights
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepVictim, find_logits
from robust_train.callbacks.helper_training import helper_labels
from robust_train.evasion.randomness import generator_for, preserved_rng

if TYPE_CHECKING:
    import pytorch_lightning as pl

AT_ONCE = 256  # rows that are labelled in one pass


def joined(batch: Any, places: tuple[Path, Path], inputs: Tensor, classes: Tensor) -> Any:
    """A batch with further rows behind its own.

    Args:
        batch: the user's, which is not written to.
        places: where its inputs ``(B, ...)`` and labels lie.
        inputs: further ones ``(A, ...)``.
        classes: their class indices ``(A, ...)``.

    Raises:
        ValueError: there is something else in the batch for every row.
    """
    x, y = (get(batch, place) for place in places)
    for path, tensor in _tensors(batch):
        if path not in places and tensor.ndim and len(tensor) == len(x):
            raise ValueError(
                f"ExtraData has inputs and labels, and the training batch also holds {place_text(path)} for every row: "
                "leave it out of the batch, or name inputs=… and labels=… where they were taken for something else"
            )
    batch = replaced(batch, places[0], torch.cat([x, inputs.to(x)]))
    return replaced(batch, places[1], torch.cat([y, _as_labels(classes, y)]))


def _as_labels(classes: Tensor, like: Tensor) -> Tensor:
    """Class indices in the form of the labels that there are: as they are, as 0 and 1, or as probabilities."""
    if like.is_floating_point() and like.ndim == classes.ndim + 1:
        classes = F.one_hot(classes, like.shape[1])
    return classes.reshape(len(classes), *like.shape[1:]).to(like)


class Mixed:
    """A loader with further rows in every batch; all else as it is.

    Args:
        loader: the user's.
        mix: ``mix(batch, taken)`` makes the batch that is handed on, and says how many rows it added; ``taken`` is how
            many were added before in this pass.
    """

    def __init__(self, loader: Any, mix: Callable[[Any, int], tuple[Any, int]]) -> None:
        self.loader, self.mix = loader, mix

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        taken = 0
        for batch in self.loader:
            mixed, added = self.mix(batch, taken)
            taken += added
            yield mixed

    def __getattr__(self, name: str) -> Any:  # sampler, dataset and whatever else Lightning reads
        return getattr(self.__dict__["loader"], name)


class ExtraData(Callback):
    """Trains on unlabelled data too: labelled once by a model, then mixed into every training batch.

    Robust training needs more data than standard training, and unlabelled data with pseudo-labels serve. The labels
    are those that the run's own module gives in eval mode with the weights of ``checkpoint``, or else of a copy that
    learns from the run's own train loader first. Beside ``AdversarialTraining`` (in any order) the mixed batch is what
    is attacked: Carmon et al.'s robust self-training.

    Args:
        data: a map-style dataset whose items are inputs, or tuples with the input first; or the path of a ``.npy`` file
            with rows ``(N, ...)``. Prepared like the items of the train loader, before anything that happens to a batch
            when it moves to the device.
        ratio: how many of its rows are added for each row of a batch, > 0; 1 makes half of every batch.
        checkpoint: weights of the model that gives the labels, of the same module; None: one is trained first.
        epochs: how long, where one is trained first, >= 1.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        seed: of the draws, and of the training of that model.

    Raises:
        ValueError: a setting is out of range; beside ``DPSGD`` or ``DataFilter``. When training starts: there is no
            such file, the rows do not fit the batch, the batch holds more than inputs and labels for every row, the
            task has no classes, or the checkpoint does not fit.

    Note:
        Rows are drawn without replacement until all were seen, anew in every epoch, on each process its own. A run that
        is resumed labels the data again: give ``checkpoint`` for the same labels.

    Reference:
        Carmon et al., "Unlabeled Data Improves Adversarial Robustness", 2019, section 3.
    """

    defends = True

    def __init__(
        self,
        data: Dataset[Any] | str,
        ratio: float = 1.0,
        checkpoint: str | None = None,
        epochs: int = 10,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(data, str) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise ValueError(f"extra_data.data must be a dataset with a length, or a path to a .npy file, got {data!r}")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < float("inf"):
            raise ValueError(f"extra_data.ratio must be > 0 and finite, got {ratio!r}")
        check_texts("extra_data", checkpoint=checkpoint, logits=logits)
        check_counts("extra_data", 1, epochs=epochs)
        check_counts("extra_data", 0, seed=seed)
        check_places("extra_data", inputs=inputs, labels=labels)
        self.data, self.ratio, self.checkpoint, self.epochs = data, ratio, checkpoint, epochs
        self.inputs, self.labels, self.logits, self.seed = inputs, labels, logits, seed
        self._rows: Any = None
        self._classes: Tensor | None = None
        self._places: tuple[Path, Path] | None = None
        self._undo = ExitStack()

    def settings(self) -> dict[str, Any]:
        names = ("data", "ratio", "checkpoint", "epochs", "inputs", "labels", "logits", "seed")
        return {name: plain(getattr(self, name)) for name in names}

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for other, why in (
            ("DPSGD", "its epsilon holds for batches that it draws itself"),
            ("DataFilter", "it judges the rows of the train loader, and would not see these"),
        ):
            refuse_beside(trainer, other, "ExtraData", f"{why}. Put the rows into the dataset instead")
        self._rows = _rows(self.data)
        self._classes = self._places = None
        self._undo.close()
        self._undo.callback(
            _seams.exchange_prepared_loader(
                trainer, lambda loader: Mixed(loader, lambda batch, taken: self._mix(trainer, batch, taken))
            )
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with preserved_rng(pl_module.device):
            if self.checkpoint is not None:
                weights = loaded_weights(pl_module, self.checkpoint, "extra_data.checkpoint")
            else:
                epochs = 1 if trainer.fast_dev_run else self.epochs  # type: ignore[attr-defined]
                weights = learned_weights(trainer, pl_module, epochs, self.seed % 2**32)
            loaders = _seams.train_loader_before(trainer)
            with _seams.generators_kept(loaders, trainer.datamodule):  # type: ignore[attr-defined]
                batch = _seams.first_batch(loaders)
            with torch.no_grad():
                self._classes = self._labelled(trainer, pl_module, batch, weights)
        counts = torch.bincount(self._classes.flatten()).tolist()
        self.announce(
            trainer,
            f"active. {len(self._rows)} further rows, {self.ratio:g} of them for each row of a batch; their labels by "
            f"class: {', '.join(map(str, counts))}.",
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        self._undo.close()
        self._rows = self._classes = self._places = None

    # --- work -----------------------------------------------------------------------------------------------------

    def _mix(self, trainer: pl.Trainer, batch: Any, taken: int) -> tuple[Any, int]:
        if self._classes is None or self._places is None:
            return batch, 0
        size = max(1, round(self.ratio * len(get(batch, self._places[0]))))
        seed = (self.seed, _seams.data_rank(trainer), trainer.current_epoch)
        rows = drawn(len(self._rows), size, taken, *seed)
        return joined(batch, self._places, _stacked(self._rows, rows), self._classes[rows]), size

    def _labelled(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, weights: dict[str, Tensor]
    ) -> Tensor:
        """The class of every row, ``(N, ...)`` on the CPU."""
        path = find_input(batch, self.inputs)
        candidates = label_candidates(batch, path, self.labels)
        if not candidates:
            raise ValueError("ExtraData found no labels in the training batch: name them with labels=…")
        shape, own = tuple(_stacked(self._rows, torch.arange(1)).shape[1:]), tuple(get(batch, path).shape[1:])
        if shape != own:
            raise ValueError(
                f"extra_data.data has rows of shape {shape}, and the training batch's input {place_text(path)} has "
                f"{own}: prepare both in the same way"
            )
        found, classes = None, []
        named = None if self.logits is None else submodule(module, self.logits)
        step = _seams.own_step(module)
        for rows in torch.arange(len(self._rows)).split(AT_ONCE):
            sent = _with_rows(batch, path, _stacked(self._rows, rows), candidates)
            sent = _seams.transferred(trainer, sent)
            layout = Layout(path, candidates[0], candidates=candidates) if found is None else found
            with (
                torch.inference_mode(False),
                _seams.autocast_context(trainer, "validation"),
                as_helper(module, weights),
            ):
                sandbox = Sandbox(module, trainer, get(sent, path).device)
                victim = StepVictim(
                    module, lambda b: step(b, *_seams.step_arguments(step, 0, 0)), sent, layout, sandbox
                )
                if found is None:
                    with torch.enable_grad():
                        found = find_logits(victim, module, named)
                    if found is None or found.labels_path is None:
                        raise ValueError(
                            "ExtraData labels rows by class, and no logits with class labels were found in the "
                            'training step: name the submodule that returns the logits with logits="…" and the labels '
                            'with labels="…"'
                        )
                    self._places = path, found.labels_path
                    victim.layout = found
                classes.append(helper_labels(victim.logits(victim.clean())).cpu())
        if self._places is not None:
            joined(batch, self._places, _stacked(self._rows, torch.arange(1)), classes[0][:1])  # refuses what misfits
        rank_zero_info(f"ExtraData: labelled {len(self._rows)} rows.")
        return torch.cat(classes)


def drawn(rows: int, size: int, taken: int, *seed: int) -> Tensor:
    """Which of ``rows`` rows come next in an epoch, ``(size,)``: all in a shuffled order, then in another one.

    Args:
        rows: how many there are.
        size: how many are wanted.
        taken: how many were taken before.
        seed: of the orders.
    """
    found: list[int] = []
    while len(found) < size:
        order, at = divmod(taken + len(found), rows)
        shuffled = torch.randperm(rows, generator=generator_for(torch.device("cpu"), *seed, order))
        found += shuffled[at : at + size - len(found)].tolist()
    return torch.tensor(found)


def _rows(data: Any) -> Any:
    if not isinstance(data, str):
        rows = data
    elif not File(data).is_file() or File(data).suffix != ".npy":
        raise ValueError(f"extra_data.data={data!r} is no .npy file")
    else:
        rows = np.load(data, allow_pickle=False, mmap_mode="r")
    if not len(rows):
        raise ValueError("extra_data.data holds no rows")
    return rows


def _stacked(rows: Any, index: Tensor) -> Tensor:
    """Inputs ``(len(index), ...)``."""
    items = [rows[i] for i in index.tolist()]
    return torch.stack([torch.as_tensor(np.array(i) if isinstance(i, np.ndarray) else i) for i in map(_input, items)])


def _input(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) else item


def _with_rows(batch: Any, path: Path, inputs: Tensor, candidates: tuple[Path, ...]) -> Any:
    """The batch with these inputs, and as many rows of whatever else has one for each."""
    x = get(batch, path)
    size, index = len(x), torch.arange(len(inputs)) % len(x)
    batch = replaced(batch, path, inputs.to(x))
    for place in candidates:
        tensor = get(batch, place)
        if tensor.ndim and len(tensor) == size:
            batch = replaced(batch, place, tensor[index])
    return batch
