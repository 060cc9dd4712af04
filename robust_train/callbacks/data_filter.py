"""Suspicious training data, found, explained and left out, in an unmodified Lightning run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, plain
from robust_train.callbacks._during import Watch
from robust_train.callbacks._dp_run import run_folder
from robust_train.callbacks._filter_files import Mask, write_outputs
from robust_train.callbacks._filtering import Judge, Judged
from robust_train.callbacks._loaders import (
    as_list,
    check_loader,
    filtered,
    filtered_iterable,
    map_loaders,
    rebuilt,
)
from robust_train.callbacks._observer import Places
from robust_train.custody.digest import digests
from robust_train.custody.merkle import merkle_root
from robust_train.evasion.randomness import preserved_rng
from robust_train.poisoning.decide import Outcome
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.filters.base import Filter
from robust_train.poisoning.filters.duplicates import Duplicates
from robust_train.poisoning.filters.isolated_groups import IsolatedGroups
from robust_train.poisoning.filters.trusted_margin import TrustedMargin
from robust_train.poisoning.policy import Policy
from robust_train.poisoning.probe import Probe
from robust_train.poisoning.quarantine import Quarantine
from robust_train.poisoning.records import Column

if TYPE_CHECKING:
    import pytorch_lightning as pl

ORDER = 1  # after a poison is simulated, before rows are drawn for DP-SGD
QUICK = 4  # batches' worth of rows that are judged in a fast_dev_run


class DataFilter(Callback):
    """Finds suspicious training rows before the first step and leaves them out; module and data stay as they are.

    A copy of the module, the probe, learns from the user's own loader for a few epochs through the user's own training
    step. Filters score every row by what the probe shows; their thresholds are calibrated with rows that bear a wrong
    label for that time, and by a second copy that is trained without the suspects. The order of work::

        setup:                  exchange the train loader
        checkpoint restored:    the same mask as before, or:
                                probe -> scores -> reference without the suspects -> verdicts -> caps -> files
        configure_optimizers:   sees the number of batches that will be
        train loader:           the user's, without the rows that are left out

    Args:
        filters: methods, a list or by name. None: exact duplicates, AUM and isolated groups, and the trusted margin where
            trusted rows are given.
        policy: what is done with suspicious rows, and its limits; None: ``Policy()``, which quarantines.
        probe: how the probe is made; None: ``Probe()``.
        trusted: rows that are known to be clean: a dataset of the same kind, row numbers of the training data, or
            ``"val"`` for the validation data. They are best checked by hand.
        trusted_size: take only so many of them, the first ones.
        predicate: told one example as the dataset yields it, says whether to keep it. The only way to filter an iterable
            dataset, and the only one that DP-SGD allows. Without ``filters`` nothing else is done.
        quarantine: file of an earlier run whose restored rows are kept, whatever the filters say.
        mask: file of an earlier run, ``filter_mask.json``, whose decisions are used again: no probe.
        loader: name or index of the loader to filter, where there are several.
        inputs: which part of a batch is the input, see ``AdversarialTraining``.
        labels: which part are the labels.
        logits: name of the submodule that returns the logits.
        features: name of the submodule whose input are the features; None: the layer that returns the logits.
        when: ``"before"`` training, by a probe; or ``"during"`` it, by how the run itself learns the rows (AUM, small
            loss), without a probe: for the first ``warmup_epochs`` every row is trained on, and a few bear wrong labels.
        warmup_epochs: how many epochs are watched, if ``when="during"``.
        restart: put weights, optimizers and schedules back to the start once the rows are judged, so that nothing
            is left of what was learned from the suspects, and from wrong labels.

    Raises:
        ValueError: a setting is out of range. In ``setup``: what cannot be combined; before training: data that cannot be
            told apart by rows, a task without classes, a mask of other data.
        TypeError: a filter, policy or probe is of another kind.

    Note:
        Decisions look at other rows, so the result is not differentially private: with ``DPSGD`` only ``predicate`` works.

    Guarantees:
        No row that is left out reaches the training step; no other is lost. When nothing is left out, the run is
        bit-identical to one without the callback. A run that resumes uses the same mask, and refuses other data. At most
        the policy's caps are left out. A row that was restored is never left out.

    References:
        Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020; Chen et al.,
        "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018.

    Example::

        trainer = Trainer(callbacks=[DataFilter()])
    """

    defends = True

    def __init__(
        self,
        filters: Sequence[Filter] | Mapping[str, Filter] | None = None,
        policy: Policy | None = None,
        probe: Probe | None = None,
        trusted: Dataset[Any] | Sequence[int] | str | None = None,
        trusted_size: int | None = None,
        predicate: Callable[[Any], bool] | None = None,
        quarantine: str | None = None,
        mask: str | None = None,
        loader: str | int | None = None,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        features: str | None = None,
        when: str = "before",
        warmup_epochs: int = 3,
        restart: bool = True,
    ) -> None:
        if when not in ("before", "during"):
            raise ValueError(f"data_filter.when must be 'before' or 'during', got {when!r}")
        if isinstance(warmup_epochs, bool) or not isinstance(warmup_epochs, int) or warmup_epochs < 1:
            raise ValueError(f"data_filter.warmup_epochs must be a whole number >= 1, got {warmup_epochs!r}")
        if filters is None:
            default = [AUM()] if when == "during" else [Duplicates(), AUM(), IsolatedGroups()]
            filters = [] if predicate is not None else default
            if trusted is not None:
                filters.append(TrustedMargin())
        self.filters = named_filters(filters)
        for name, value, kind in (("policy", policy, Policy), ("probe", probe, Probe)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"data_filter.{name} must be a robust_train {kind.__name__}, got {value!r}")
        if isinstance(trusted, str) and trusted != "val":
            raise ValueError(f"data_filter.trusted must be a dataset, row numbers or 'val', got {trusted!r}")
        if trusted_size is not None and (trusted is None or trusted_size < 2):
            raise ValueError(f"data_filter.trusted_size must be >= 2, and needs trusted=, got {trusted_size}")
        if trusted is None and (needy := [n for n, f in self.filters.items() if "trusted" in f.needs]):
            raise ValueError(f"data_filter.filters: {', '.join(needy)} needs trusted rows: give trusted=")
        if when == "during" and (other := [n for n, f in self.filters.items() if f.needs != {"dynamics"}]):
            raise ValueError(
                f"data_filter.filters: {', '.join(other)} cannot judge rows while the run trains (when='during'), which "
                "shows training dynamics only: use AUM or SmallLoss, or when='before'"
            )
        if not self.filters and predicate is None:
            raise ValueError("data_filter.filters is empty: name a filter, or give a predicate")
        self.policy, self.probe = policy or Policy(), probe or Probe()
        self.trusted, self.trusted_size, self.predicate = trusted, trusted_size, predicate
        self.quarantine, self.mask, self.loader = quarantine, mask, loader
        self.inputs, self.labels, self.logits, self.features = inputs, labels, logits, features
        self.when, self.warmup_epochs, self.restart = when, warmup_epochs, restart
        self._mask: Mask | None = None
        self._watch: Watch | None = None
        self._resumed = False
        self._judged: Any = None  # the dataset that the mask is for
        self._place: tuple[str | int, ...] = ()
        self._undo = ExitStack()

    def settings(self) -> dict[str, Any]:
        names = ("filters", "policy", "trusted_size", "quarantine", "mask", "loader")
        names += ("inputs", "labels", "logits", "features", "when", "warmup_epochs", "restart")
        trusted = self.trusted if self.trusted is None or isinstance(self.trusted, str) else type(self.trusted).__name__
        found = {name: plain(getattr(self, name)) for name in names}
        probe = {k: v for k, v in plain(self.probe).items() if k != "extractor"}
        return {**found, "probe": probe, "trusted": trusted, "predicate": self.predicate is not None}

    def state(self) -> dict[str, Any]:
        return {"settings": self.settings(), "mask": None if self._mask is None else self._mask.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("mask") is not None:
            self._mask, self._resumed = Mask.from_dict(state_dict["mask"]), True

    @property
    def kept(self) -> np.ndarray:
        """Which rows are trained on, bool ``(N,)``.

        Raises:
            RuntimeError: nothing was decided yet.
        """
        if self._mask is None:
            raise RuntimeError("DataFilter has decided nothing yet: it does so when fit begins")
        return self._mask.keep

    # --- events, in the order in which Lightning calls them --------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._refuse(trainer, pl_module)
        self._resumed = False
        self._undo.callback(_seams.exchange_train_loader(trainer, lambda loaders: self._exchange(loaders), ORDER))
        self._undo.callback(_seams.once_restored(trainer, lambda: self._begin(trainer, pl_module)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watch is not None:
            self._watch.begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is not None:
            self._watch.batch_begins(batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watch is not None and self._watch.epochs >= self.warmup_epochs:
            self._purge(trainer, self._watch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._watch is not None:
            self._watch.epoch_begins()
        if self._mask is not None:
            pl_module.log("filter/kept", float(self._mask.keep.sum()), rank_zero_only=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.end(restart=False)
            self._watch = None
        self._undo.close()

    # --- work -----------------------------------------------------------------------------------------------------

    def _refuse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (reason := _seams.unsupported_strategy(trainer)) is not None:
            raise ValueError(f"DataFilter cannot work with {reason}")
        if _seams.takes_iterator(module):
            raise ValueError(
                "DataFilter cannot work with a training_step that takes dataloader_iter and fetches its own batches: "
                "take a batch"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, DataFilter) for c in callbacks) > 1:
            raise ValueError("two DataFilter callbacks in one Trainer: give one of them all filters")
        if self.filters and any(type(c).__name__ == "DPSGD" for c in callbacks):
            raise ValueError(
                f"DataFilter(filters={list(self.filters)}) decides over a row by looking at the others, for which "
                "DPSGD's guarantee does not hold: use DataFilter(predicate=…), which looks at one example, or filter in "
                "a run of its own on public data"
            )

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Decide, unless the checkpoint brought the decision; every process learns what the first one decided."""
        with preserved_rng(trainer.strategy.root_device):
            loaders = _seams.train_loader_before(trainer, ORDER)
            with _seams.generators_kept(loaders):
                loader = self._choose(loaders)
                if isinstance(getattr(loader, "dataset", None), IterableDataset):
                    self._stream(loader)
                    return
                loader = check_loader(loader)
                folder = run_folder(trainer)
                if self.when == "during" and self._mask is None and self.mask is None and self.filters:
                    self._watch = self._watching(trainer, module, loader)
                    return
                state = _seams.wait_for_first(trainer, lambda: self._decide(trainer, module, loaders, loader, folder))
        self._judged = loader.dataset
        if not trainer.is_global_zero or self._mask is None:
            self._mask = Mask.from_dict(state)
        keep = self._mask.keep
        self.announce(
            trainer,
            f"active. {int(keep.sum())} of {len(keep)} rows are trained on; {int((~keep).sum())} are left out"
            + (" (the mask of the checkpoint)." if self._resumed else "."),
        )

    def _decide(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loaders: Any,
        loader: DataLoader[Any],
        folder: Path | None,
    ) -> dict[str, Any]:
        size = len(loader.dataset)  # type: ignore[arg-type]
        content, root = identity(loader.dataset)
        known = Mask.read(self.mask) if self.mask is not None and not self._resumed else self._mask
        if known is not None:
            known.check(size, root)
            self._mask = known
            if folder is not None:
                known.write(folder / Mask.FILE)
            return known.to_dict()
        earlier, restored = self._earlier(size, content, root)
        if trainer.fast_dev_run and self.filters:
            rank_zero_info("DataFilter: fast_dev_run, so a few rows are judged, and none is left out.")
            keep = self._quick(trainer, module, loaders, loader, size)
            self._mask = Mask(keep, root, self.policy.action)
            return self._mask.to_dict()
        judged = self._judge(trainer, module, loaders, loader, restored)
        return self._settle(trainer, judged, loader, content, root, earlier, folder).to_dict()

    def _earlier(self, size: int, content: list[str] | None, root: str) -> tuple[Quarantine | None, np.ndarray]:
        """The quarantine of an earlier run, and the numbers of the rows that were restored from it."""
        if self.quarantine is None:
            return None, np.empty(0, dtype=np.int64)
        earlier = Quarantine.read(self.quarantine)
        return earlier, np.flatnonzero(earlier.restored(size, digests=content, root=root))

    def _settle(
        self,
        trainer: Any,
        judged: Judged,
        loader: DataLoader[Any],
        content: list[str] | None,
        root: str,
        earlier: Quarantine | None,
        folder: Path | None,
    ) -> Mask:
        """From what was found to a mask, and the files that say why."""
        touched = judged.outcome.touched
        downweight = self.policy.action == "downweight"
        weights = np.where(touched, self.policy.weight, 1.0) if downweight else None
        keep = np.ones(len(touched), dtype=bool) if downweight else ~touched
        self._mask = Mask(keep, root, self.policy.action, weights)
        for note in judged.outcome.notes:
            rank_zero_warn(f"DataFilter: {note} A larger policy.max_drop or max_drop_per_class is your consent.")
        if folder is not None and trainer.is_global_zero:
            known = simulation(trainer, judged)
            settings = self.settings()
            write_outputs(folder, judged, self._mask, content, root, settings, loader, self.inputs, known, earlier)
        return self._mask

    def _watching(self, trainer: Any, module: Any, loader: DataLoader[Any]) -> Watch:
        """From here on the run is watched; what the rows are is settled after the warm-up."""
        if self._place:
            raise ValueError(
                "DataFilter(when='during') needs one train loader: use when='before', or put them together"
            )
        if any(type(c).__name__ == "AdversarialTraining" for c in trainer.callbacks):
            raise ValueError(
                "DataFilter(when='during') and AdversarialTraining: how adversarial examples are learned says little of "
                "the rows. Use DataFilter(when='before')"
            )
        self._judged = loader.dataset
        size = len(loader.dataset)  # type: ignore[arg-type]
        places = Places((), self.inputs, self.labels, self.logits, self.features)
        self.announce(trainer, f"active. Rows are judged after {self.warmup_epochs} epochs of this run.")
        return Watch(trainer, module, size, places, self.probe, restart=self.restart)

    def _purge(self, trainer: Any, watch: Watch) -> None:
        """Judge the rows by the epochs so far, and go on without the suspects."""
        loader = self._choose(_seams.train_loader_before(trainer, ORDER))
        content, root = _seams.wait_for_first(trainer, lambda: identity(loader.dataset))
        earlier, restored = self._earlier(len(loader.dataset), content, root)
        judged = watch.judge(self.filters, self.policy, restored)
        folder = run_folder(trainer)
        keep = self._settle(trainer, judged, loader, content, root, earlier, folder).keep
        self._judged, self._watch = loader.dataset, None
        watch.end(restart=self.restart)
        _seams.reload_train_loader(trainer)
        again = " Training starts again from the beginning." if self.restart else ""
        rank_zero_info(f"DataFilter: {int(keep.sum())} of {len(keep)} rows are trained on from here.{again}")

    def _judge(self, trainer: Any, module: Any, loaders: Any, loader: DataLoader[Any], restored: np.ndarray) -> Judged:
        dataset: Any = loader.dataset
        columns = []
        if self.predicate is not None:
            refused = np.array([not self.predicate(dataset[i]) for i in range(len(dataset))], dtype=bool)
            evidence = {"method": "the user's predicate", "expected_fpr": None}
            columns.append(Column("predicate", refused.astype(float), 0.5, refused, evidence))
        if not self.filters:
            touched = columns[0].flagged.copy()
            touched[restored] = False
            labels = np.zeros(len(dataset), dtype=np.int64)
            return Judged(labels, 1, columns, Outcome(touched, np.zeros(len(dataset), dtype=bool)))
        judge = Judge(
            trainer,
            module,
            loaders,
            loader,
            filters=self.filters,
            policy=self.policy,
            probe=self.probe,
            places=Places(self._place, self.inputs, self.labels, self.logits, self.features),
            **self._trusted_rows(trainer),
        )
        judged = judge.judge(restored)
        if columns:
            judged.columns[:0] = columns
            judged.outcome.touched[:] |= columns[0].flagged
            judged.outcome.touched[restored] = False
        return judged

    def _quick(self, trainer: Any, module: Any, loaders: Any, loader: DataLoader[Any], size: int) -> np.ndarray:
        """In a ``fast_dev_run``: the whole chain on a few rows, whose verdicts mean nothing."""
        few = min(size, QUICK * (loader.batch_size or 1))
        small = rebuilt(loader, Subset(loader.dataset, list(range(few))), shuffle=True)
        inner = map_loaders(lambda old, path: small if path == self._place else old, loaders)
        probe = self.probe
        self.probe = Probe(1, seed=probe.seed) if probe.checkpoint is None else probe
        try:
            self._judge(trainer, module, inner, small, np.empty(0, dtype=int))
        finally:
            self.probe = probe
        return np.ones(size, dtype=bool)

    def _trusted_rows(self, trainer: Any) -> dict[str, Any]:
        trusted, most = self.trusted, self.trusted_size
        if trusted is None:
            return {}
        if isinstance(trusted, str):
            trusted = _seams.validation_dataset(trainer)
            if trusted is None:
                raise ValueError("data_filter.trusted='val', and the run has no validation data: give a dataset")
        if isinstance(trusted, Dataset) or (not isinstance(trusted, Sequence) and hasattr(trusted, "__getitem__")):
            size = len(trusted)  # type: ignore[arg-type]
            if most is not None and most < size:
                trusted = Subset(trusted, list(range(most)))  # type: ignore[arg-type]
            return {"trusted": trusted}
        return {"trusted_rows": np.asarray(list(trusted)[:most], dtype=np.int64)}

    def _stream(self, loader: Any) -> None:
        if self.predicate is None:
            check_loader(loader)  # says what to do
        if self.filters:
            raise ValueError(
                f"{type(loader.dataset).__name__} is an iterable dataset, whose rows cannot be compared with one another: "
                "use DataFilter(predicate=…) without filters, or a map-style dataset"
            )
        rank_zero_info("DataFilter: active. Each example of the stream is told to the predicate.")

    def _choose(self, loaders: Any) -> Any:
        """The loader to filter among those that there are."""
        found = as_list(loaders)
        if self.loader is None and len(found) > 1:
            names = ", ".join(".".join(map(str, path)) for path, _ in found)
            raise ValueError(f"there are {len(found)} train loaders ({names}): say which to filter with loader=…")
        for path, loader in found:
            if self.loader is None or ".".join(map(str, path)) == str(self.loader):
                self._place = path
                return loader
        names = ", ".join(".".join(map(str, path)) for path, _ in found)
        raise ValueError(f"data_filter.loader={self.loader!r} names none of the train loaders: {names}")

    def _exchange(self, loaders: Any) -> Any:
        """What the training loop is given in place of the user's loaders."""

        def exchange(loader: Any, path: tuple[str | int, ...]) -> Any:
            if path != self._place:
                return loader
            if isinstance(getattr(loader, "dataset", None), IterableDataset) and self.predicate is not None:
                return filtered_iterable(loader, self.predicate)
            if self._mask is None:
                return loader
            if check_loader(loader).dataset is not self._judged:
                self._mask.check(len(loader.dataset), identity(loader.dataset)[1])
                self._judged = loader.dataset
            return filtered(loader, self._mask.keep, self._mask.weights)

        return map_loaders(exchange, loaders)


def named_filters(filters: Sequence[Filter] | Mapping[str, Filter]) -> dict[str, Filter]:
    """Filters by name: the user's, or that of a filter's module.

    Raises:
        TypeError: one is no filter.
        ValueError: two have the same name.
    """
    if isinstance(filters, Mapping):
        named = {str(name): value for name, value in filters.items() if value is not None}
    else:
        names = [type(value).__module__.rpartition(".")[2] for value in filters]
        if len(set(names)) < len(names):
            raise ValueError("data_filter.filters: two of a kind need names of their own: give a dict")
        named = dict(zip(names, filters, strict=True))
    for name, value in named.items():
        if not isinstance(value, Filter):
            raise TypeError(f"data_filter.filters: {name} must be a robust_train Filter, got {value!r}")
    return named


def identity(dataset: Any) -> tuple[list[str] | None, str]:
    """SHA-256 of every row in hex, and what tells the whole dataset from another: the Merkle root of the rows.

    A dataset that augments its rows at random has other rows each time: there are no digests then, and it is told by its
    type and length.
    """
    try:
        found = digests(dataset)
    except ValueError:
        name = f"{type(dataset).__module__}.{type(dataset).__qualname__}/{len(dataset)}"
        return None, hashlib.sha256(name.encode()).hexdigest()
    return [d.hex() for d in found], merkle_root(found).hex()


def simulation(trainer: Any, judged: Judged) -> dict[str, Any] | None:
    """What is known of a simulated poison, where the run simulates one: it comes first in the report."""
    for callback in trainer.callbacks:
        if type(callback).__name__ == "PoisonSimulation":
            return callback.report(judged.outcome.touched)
    return None
