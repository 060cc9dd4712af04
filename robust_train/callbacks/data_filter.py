"""Suspicious training data, found, explained and left out, in an unmodified Lightning run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, plain
from robust_train.callbacks._dp_run import run_folder
from robust_train.callbacks._during import Watch
from robust_train.callbacks._filter_files import Mask, identity, say_what_was_found, simulation, write_outputs
from robust_train.callbacks._filter_refusals import (
    PREDICATE,
    check_settings,
    named_filters,
    refuse_what_cannot_work,
    refuse_whole_batches,
)
from robust_train.callbacks._filter_rows import refused_rows, spare_a_row, trusted_rows
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
from robust_train.evasion.randomness import preserved_rng
from robust_train.poisoning.decide import Outcome
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.filters.base import Filter
from robust_train.poisoning.filters.duplicates import Duplicates
from robust_train.poisoning.filters.isolated_groups import IsolatedGroups
from robust_train.poisoning.filters.trusted_margin import TrustedMargin
from robust_train.poisoning.policy import Policy
from robust_train.poisoning.probe import Probe
from robust_train.poisoning.quarantine import RESTORED, Quarantine
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
        filters: methods, a list or by name. None: exact duplicates, AUM and isolated groups, and the trusted margin
            where trusted rows are given.
        policy: what is done with suspicious rows, and its limits; None: ``Policy()``, which quarantines.
        probe: how the probe is made; None: ``Probe()``.
        trusted: rows that are known to be clean: a dataset of the same kind, row numbers of the training data, or
            ``"val"`` for the validation data. They are best checked by hand.
        trusted_size: take only so many of them, the first ones.
        predicate: told one example as the dataset yields it, says whether to keep it; the policy's caps are not for it.
            The only way to filter an iterable dataset, and the only one that DP-SGD allows. Without ``filters`` nothing
            else is done; labels are in the files then if each example has a class index, and 0 for every row if not.
        quarantine: file of an earlier run whose restored rows are kept, whatever the filters say.
        mask: file of an earlier run, ``filter_mask.json``, whose decisions are used again: no probe.
        loader: name or index of the loader to filter, where there are several.
        inputs: which part of a batch is the input, see ``AdversarialTraining``.
        labels: which part are the labels.
        logits: name of the submodule that returns the logits.
        features: name of the submodule whose input are the features; None: the layer that returns the logits.
        when: ``"before"`` training, by a probe; or ``"during"`` it, by how the run itself learns the rows (AUM, small
            loss), without a probe: in the first ``warmup_epochs`` every row is trained on, and a few bear wrong labels.
        warmup_epochs: how many epochs are watched, if ``when="during"``.
        restart: put weights, optimizers and schedules back to the start once the rows are judged, so that nothing
            is left of what was learned from the suspects, and from wrong labels.

    Raises:
        ValueError: a setting is out of range. In ``setup``: what cannot be combined; before training: data that cannot
            be told apart by rows or are not finite, a task without classes, rows of one class only, a mask of other
            data. While a stream is read: the predicate drops every example.
        TypeError: a filter, policy, probe or ``trusted`` is of another kind.

    Note:
        Decisions look at other rows, so the result is not differentially private: with ``DPSGD`` only ``predicate``
        works. The probe calls the module's hooks: what they do outside of the module (print, count in a global) is done
        there too. ``train_dataloader()`` is called once more, and must give the same rows in every call.

    Guarantees:
        No row that is left out reaches the training step; no other is lost. When nothing is left out, the run is
        bit-identical to one without the callback. A run that resumes uses the same mask, and refuses other data.
        Filters touch no more than the policy's caps, no row that was restored, and none that is trusted.

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
        if filters is None:
            default: list[Filter] = [AUM()] if when == "during" else [Duplicates(), AUM(), IsolatedGroups()]
            if trusted is not None:
                default.append(TrustedMargin())
            filters = [] if predicate is not None else default
        self.filters = named_filters(filters)
        self.policy = Policy() if policy is None else policy
        self.probe = Probe() if probe is None else probe
        self.trusted, self.trusted_size, self.predicate = trusted, trusted_size, predicate
        self.quarantine, self.mask, self.loader = quarantine, mask, loader
        self.inputs, self.labels, self.logits, self.features = inputs, labels, logits, features
        self.when, self.warmup_epochs, self.restart = when, warmup_epochs, restart
        check_settings(self)
        self._mask: Mask | None = None
        self._watch: Watch | None = None
        self._judged_by: Watch | None = None  # in the epoch that has just ended
        self._resumed = self._quick_run = False
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
        refuse_what_cannot_work(trainer, pl_module, self)
        if self._quick_run:  # what was decided then means nothing
            self._mask = None
        self._resumed, self._quick_run = False, bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
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
        if self._judged_by is not None:
            self._judged_by.start_again()
            self._judged_by = None
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
            self._watch.end()
            self._watch = None
        self._undo.close()

    # --- work -----------------------------------------------------------------------------------------------------

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Decide, unless the checkpoint brought the decision; every process learns what the first one decided."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        with preserved_rng(trainer.strategy.root_device):
            loaders = _seams.train_loader_before(trainer, ORDER)
            _seams.reload_train_loader(trainer)  # whoever asked for it earlier was given every row
            with _seams.generators_kept(loaders, data, self.trusted):
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
                folder.mkdir(parents=True, exist_ok=True)
                known.write(folder / Mask.FILE)
            return known.to_dict()
        self._check_before_judging(trainer, loader)
        earlier, restored = self._earlier(size, content, root)
        if self._quick_run and self.filters:
            rank_zero_info("DataFilter: fast_dev_run, so a few rows are judged, and none is left out.")
            keep = self._quick(trainer, module, loaders, loader, size)
            self._mask = Mask(keep, root, self.policy.action)
            return self._mask.to_dict()
        judged = self._judge(trainer, module, loaders, loader, restored)
        return self._settle(trainer, judged, loader, content, root, earlier, folder).to_dict()

    def _check_before_judging(self, trainer: Any, loader: DataLoader[Any]) -> None:
        """Refuse now what would be refused once the rows are judged."""
        if self.filters:
            refuse_whole_batches(loader)
        some = np.arange(len(loader.dataset)) > 0  # type: ignore[arg-type]
        filtered(loader, some, np.ones(len(some)) if self.filters and self.policy.action == "downweight" else None)
        if trainer.ckpt_path is not None and self.filters:
            rank_zero_warn(
                "DataFilter: the checkpoint was trained without it, and what judges the rows has learned from all of "
                "them. Start from the beginning, or use the mask of another run: mask=…"
            )

    def _earlier(self, size: int, content: list[str] | None, root: str) -> tuple[Quarantine | None, np.ndarray]:
        """The quarantine of an earlier run, and the numbers of the rows that were restored from it."""
        if self.quarantine is None:
            return None, np.empty(0, dtype=np.int64)
        try:
            earlier = Quarantine.read(self.quarantine)
            restored = np.flatnonzero(earlier.restored(size, digests=content, root=root))
        except ValueError as error:
            raise ValueError(f"data_filter.quarantine: {error}") from None
        if not (count := earlier.counts()[RESTORED]):
            rank_zero_info(f"DataFilter: nothing was restored in the quarantine {self.quarantine}: it keeps no row.")
        elif not len(restored):
            rank_zero_warn(
                f"DataFilter: none of the {count} rows that were restored in the quarantine {self.quarantine} is in "
                "the train data. Is it of other data?"
            )
        return earlier, restored

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
        for note in judged.outcome.notes:
            rank_zero_warn(f"DataFilter: {note}")
        spare_a_row(judged, loader, trainer)
        touched, weights = judged.outcome.touched, None
        keep = ~touched
        if self.policy.action == "downweight":
            light = touched & ~judged.refused
            keep = ~(touched & judged.refused)
            weights = np.where(light, self.policy.weight, 1.0) if light.any() else None
        self._mask = Mask(keep, root, self.policy.action, weights)
        say_what_was_found(judged)
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
                "DataFilter(when='during') and AdversarialTraining: how adversarial examples are learned says little "
                "of the rows. Use DataFilter(when='before')"
            )
        refuse_whole_batches(loader)
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
        watch.end()
        self._judged_by = watch
        _seams.reload_train_loader(trainer)
        again = " Training starts again from the beginning." if self.restart else ""
        rank_zero_info(f"DataFilter: {int(keep.sum())} of {len(keep)} rows are trained on from here.{again}")

    def _judge(self, trainer: Any, module: Any, loaders: Any, loader: DataLoader[Any], restored: np.ndarray) -> Judged:
        dataset: Any = loader.dataset
        places = Places(self._place, self.inputs, self.labels, self.logits, self.features)
        refused = labels = None
        if self.predicate is not None:
            refused, labels = refused_rows(dataset, self.predicate, places)
        if not self.filters:
            nothing = np.zeros(len(dataset), dtype=bool)
            known = nothing.astype(np.int64) if labels is None else labels
            judged = Judged(known, int(known.max()) + 1, [], Outcome(nothing.copy(), nothing))
        else:
            judged = Judge(
                trainer,
                module,
                loaders,
                loader,
                filters=self.filters,
                policy=self.policy,
                probe=self.probe,
                places=places,
                **trusted_rows(trainer, self.trusted, self.trusted_size, loader),
            ).judge(restored)
        if refused is not None:
            evidence = {"method": "the user's predicate", "expected_fpr": None}
            if not self.filters and labels is None:
                evidence["note"] = "no label was found in some example: every row bears label 0 here"
            judged.columns.insert(0, Column(PREDICATE, refused.astype(float), 0.5, refused, evidence))
            judged.outcome.touched[refused] = True
            judged.outcome.touched[restored] = False
            judged.outcome.capped[refused] = False
        return judged

    def _quick(self, trainer: Any, module: Any, loaders: Any, loader: DataLoader[Any], size: int) -> np.ndarray:
        """In a ``fast_dev_run``: the whole chain on a few rows, whose verdicts mean nothing."""
        few = min(size, QUICK * (loader.batch_size or 1))
        small = rebuilt(loader, Subset(loader.dataset, list(range(few))), shuffle=True)
        inner = map_loaders(lambda old, path: small if path == self._place else old, loaders)
        probe, trusted = self.probe, self.trusted
        self.probe = probe if probe.checkpoint is not None else replace(probe, epochs=1)
        if "trusted_rows" in trusted_rows(trainer, self.trusted, self.trusted_size, loader):
            self.trusted = range(few // 2)
        try:
            judged = self._judge(trainer, module, inner, small, np.empty(0, dtype=int))
        finally:
            self.probe, self.trusted = probe, trusted
        keep = np.ones(size, dtype=bool)
        keep[:few] = ~judged.refused
        return keep

    def _stream(self, loader: Any) -> None:
        if self.predicate is None:
            check_loader(loader)  # says what to do
        name = type(loader.dataset).__name__
        if self.filters:
            raise ValueError(
                f"DataFilter: {name} is an iterable dataset, whose rows cannot be compared with one another: use "
                "DataFilter(predicate=…) without filters, or a map-style dataset"
            )
        if self.quarantine is not None or self._mask is not None:
            raise ValueError(
                f"DataFilter: {name} is an iterable dataset, whose rows have no numbers: neither a quarantine nor the "
                "mask of another run or checkpoint says anything of them. Use DataFilter(predicate=…) alone, or a "
                "map-style one"
            )
        rank_zero_info("DataFilter: active. Each example of the stream is told to the predicate.")

    def _choose(self, loaders: Any) -> Any:
        """The loader to filter among those that there are."""
        found = as_list(loaders)
        names = ", ".join(".".join(map(str, path)) for path, _ in found) or "there is one, which has no name"
        if self.loader is None and len(found) > 1:
            raise ValueError(
                f"DataFilter: there are {len(found)} train loaders ({names}): say which to filter with loader=…"
            )
        for path, loader in found:
            if self.loader is None or ".".join(map(str, path)) == str(self.loader):
                self._place = path
                return loader
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
