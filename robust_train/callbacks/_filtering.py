"""How rows are judged before training: probe, scores, a model without the suspects, calibrated verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import replaced
from robust_train.callbacks._filter_refusals import PREDICATE, REFERENCE, refuse_one_class
from robust_train.callbacks._inner import fit_copy
from robust_train.callbacks._loaders import copied, map_loaders, rebuilt
from robust_train.callbacks._observer import Observed, Observer, Places, WrongLabels, margin
from robust_train.callbacks._recorder import Recorder
from robust_train.poisoning.decide import (
    CANARIES,
    LEAST_CANARIES,
    Outcome,
    Verdict,
    by_canaries,
    by_conflict,
    by_exclusion,
    confirmed,
    decide,
    labels_like,
)
from robust_train.poisoning.filters.base import Filter, Rows, Scores
from robust_train.poisoning.policy import Policy
from robust_train.poisoning.probe import Probe
from robust_train.poisoning.records import Column

if TYPE_CHECKING:
    import pytorch_lightning as pl

ROUNDS = 2  # of references, at most
FOLDS = 2  # of the trusted rows, for their own scores
DRAWS = 8  # wrong labels a canary, once it is known which labels suspects bear


@dataclass
class Judged:
    """What was found out about N rows.

    Attributes:
        labels: int64 ``(N,)``.
        classes: number of classes.
        columns: one a filter, in their order.
        outcome: what becomes of the rows.
        probe: what it cost and what it knew, for the report.
    """

    labels: np.ndarray
    classes: int
    columns: list[Column]
    outcome: Outcome
    probe: dict[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> np.ndarray:
        """What the user's predicate refuses, bool ``(N,)``."""
        found = [column.flagged for column in self.columns if column.name == PREDICATE]
        return found[0] if found else np.zeros(len(self.labels), dtype=bool)


class Judge:
    """Judges the rows of one train loader.

    Args:
        trainer: the outer Trainer.
        module: the user's LightningModule.
        loaders: what ``train_dataloader()`` returned.
        loader: the one among them whose rows are judged.
        filters: by name.
        policy: how verdicts are calibrated and capped.
        probe: how the probe is made.
        places: where things are in a batch.
        trusted: dataset of rows that are known to be clean, or None.
        trusted_rows: row numbers of the training data that are known to be clean.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loaders: Any,
        loader: Any,
        *,
        filters: Mapping[str, Filter],
        policy: Policy,
        probe: Probe,
        places: Places,
        trusted: Any = None,
        trusted_rows: np.ndarray | None = None,
    ) -> None:
        self._trainer, self._module, self._loaders, self._loader = trainer, module, loaders, loader
        self._filters, self._policy, self._probe, self._places = dict(filters), policy, probe, places
        self._size = len(loader.dataset)
        self._all = loader.dataset if trusted is None else ConcatDataset([loader.dataset, trusted])
        extra = np.arange(self._size, len(self._all))
        self._trusted = np.concatenate([extra, [] if trusted_rows is None else trusted_rows]).astype(np.int64)
        self._epochs = 0

    def judge(self, restored: np.ndarray) -> Judged:
        """Everything, in order; ``restored`` rows are kept whatever is found."""
        begun = time.perf_counter()
        wrong = WrongLabels.drawn(self._size, self._probe.canaries_for(self._size), self._probe.seed)
        wrong.rows[self._trusted[self._trusted < self._size]] = False
        seen = self._observe_probe(wrong)
        labels, canary, epochs = seen.labels, wrong.rows, self._epochs
        if not self._trainer.fast_dev_run:  # type: ignore[attr-defined]  # the first rows may be of one class
            refuse_one_class(labels)
        columns, groups = self._score(seen, wrong)
        suspects = canary.copy()
        for scores, verdict in columns.values():
            suspects |= verdict.flagged
            if scores.groups is not None:
                suspects |= scores.groups.numpy() >= 0
        probed = time.perf_counter()
        if self._worth_checking(columns, groups) and self._can_refer(suspects):
            self._check(seen, wrong, columns, groups, suspects)
        for _, verdict in columns.values():
            verdict.flagged[self._trusted[self._trusted < self._size]] = False
        flagged = {name: verdict.flagged for name, (_, verdict) in columns.items()}
        values = {name: scores.values.numpy() for name, (scores, _) in columns.items()}
        outcome = decide(flagged, values, labels.numpy(), self._policy, restored)
        found = [
            Column(name, values[name], verdict.threshold, verdict.flagged, verdict.calibration)
            for name, (_, verdict) in columns.items()
        ]
        cost = {
            "epochs": epochs,
            "reference_epochs": self._epochs - epochs,
            "seconds": round(probed - begun, 1),
            "reference_seconds": round(time.perf_counter() - probed, 1),
            "accuracy_on_training_rows": float((seen.logits.argmax(1) == labels).float().mean()),
            "canaries": int(canary.sum()),
            "trusted": len(self._trusted),
        }
        return Judged(labels.numpy(), seen.classes, found, outcome, cost)

    # --- the probe ------------------------------------------------------------------------------------------------

    def _observe_probe(self, wrong: WrongLabels) -> Observed:
        needs = frozenset().union(*(f.needs for f in self._filters.values())) & {"features", "inputs", "dynamics"}
        rows = self._loader.dataset
        if self._probe.checkpoint is not None:
            if "dynamics" in needs:
                names = [n for n, f in self._filters.items() if "dynamics" in f.needs]
                raise ValueError(
                    f"data_filter.filters: {', '.join(names)} watch a probe while it is trained, and with "
                    f"probe.checkpoint={self._probe.checkpoint!r} none is: leave the checkpoint out, or choose other "
                    "filters"
                )
            rank_zero_info("DataFilter: looking at the rows through the checkpoint's weights.")
            return self._fit(rows, needs, wrong=None, train=None)
        if not any(f.needs - {"inputs", "trusted"} for f in self._filters.values()):
            return self._fit(rows, needs, wrong=None, train=None)  # nobody asks what the module makes of the rows
        recorder = Recorder()
        train = recorder.attach(self._for_training(rows))
        rank_zero_info(
            f"DataFilter: training a probe on {self._size} rows for {self._probe.epochs_for(len(train))} epochs."
        )
        return self._fit(rows, needs, wrong=wrong, train=train, recorder=recorder)

    def _fit(
        self,
        looked_at: Any,
        wanted: frozenset[str],
        *,
        wrong: WrongLabels | None,
        train: Any,
        recorder: Recorder | None = None,
        seed: int = 0,
    ) -> Observed:
        """Train a copy on ``train`` and look at every row of ``looked_at``; without ``train`` only look."""
        everything = copied(rebuilt(self._loader, looked_at, shuffle=False), persistent_workers=False)
        observer = Observer(
            everything,
            len(looked_at),
            self._places,
            wanted,
            recorder,
            wrong,
            self._around(),
            self._probe.extractor,
            train=train is not None,
        )
        structure = self._with(everything if train is None else train)
        epochs = 1 if train is None else self._probe.epochs_for(len(train))
        self._epochs += epochs * (train is not None)
        fit_copy(
            self._trainer,
            self._module,
            structure,
            epochs=epochs,
            seed=self._probe.seed + seed,
            callbacks=[observer],
            checkpoint=self._probe.checkpoint if train is None else None,
        )
        assert observer.observed is not None  # noqa: S101  (the last hook of a fit made it)
        return observer.observed

    def _for_training(self, rows: Any) -> DataLoader[Any]:
        """In random order, without a batch of a single row, from which batch normalisation cannot learn."""
        loader = rebuilt(self._loader, rows, shuffle=True)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        batches: Any = getattr(loader, name)
        if batches.batch_size == 1 or len(rows) <= batches.batch_size or len(rows) % batches.batch_size != 1:
            return loader
        return copied(loader, **{name: BatchSampler(batches.sampler, batches.batch_size, drop_last=True)})

    def _with(self, loader: Any) -> Any:
        """The user's loaders with another one in the judged one's place, and copies of the others."""

        def exchanged(old: Any, path: Any) -> Any:
            return loader if path == self._places.loader else copied(old) if isinstance(old, DataLoader) else old

        return map_loaders(exchanged, self._loaders)

    def _around(self) -> Callable[[Any], Any]:
        if not self._places.loader:
            return lambda batch: batch
        template = _seams.first_batch(self._with(copied(self._loader)))  # of copies, which it may begin
        return lambda batch: replaced(template, self._places.loader, batch)

    # --- scores and verdicts --------------------------------------------------------------------------------------

    def _score(
        self, seen: Observed, wrong: WrongLabels
    ) -> tuple[dict[str, tuple[Scores, Verdict]], dict[str, np.ndarray]]:
        """Scores of all filters that need no reference, and verdicts where the canaries or the rows say enough."""
        canary = wrong.rows
        rows = Rows(
            seen.labels,
            seen.classes,
            inputs=seen.inputs,
            features=seen.features,
            logits=seen.logits,
            losses=seen.losses,
            margins=seen.margins,
        )
        misled = replace(rows, labels=wrong.of(seen.labels, seen.classes))
        columns: dict[str, tuple[Scores, Verdict]] = {}
        groups: dict[str, np.ndarray] = {}
        nothing = np.zeros(len(rows), dtype=bool)
        for name, method in self._filters.items():
            if "trusted" in method.needs:
                continue
            if "label_noise" in method.finds:
                scores = method(misled)
                verdict = by_canaries(
                    scores.values.numpy(), canary, target_fpr=self._policy.target_fpr, min_power=self._policy.min_power
                )
            else:
                scores = method(rows)
                if scores.groups is not None:
                    groups[name] = scores.groups.numpy()
                    note = "no group of rows lies apart from its class"
                    verdict = Verdict(
                        nothing, None, {"method": "training without the groups", "groups": [], "note": note}
                    )
                elif "duplicates" in method.finds:
                    verdict = by_conflict(scores.values.numpy())
                else:
                    note = "it ranks rows; no threshold could be calibrated, and nothing is decided on it"
                    verdict = Verdict(nothing, None, {"method": "none", "note": note})
            columns[name] = scores, verdict
        return columns, groups

    def _worth_checking(self, columns: dict[str, tuple[Scores, Verdict]], groups: dict[str, np.ndarray]) -> bool:
        """Whether to train a reference: for trusted rows, groups to judge, or more noise than false alarms explain."""
        noise = [v.calibration.get("noise_at_most", 0.0) for _, v in columns.values() if v.threshold is not None]
        return (
            len(self._trusted) > 0
            or any((g >= 0).any() for g in groups.values())
            or max(noise, default=0.0) > 2 * self._policy.target_fpr
        )

    def _can_refer(self, suspects: np.ndarray) -> bool:
        """Whether there are rows to train a reference on."""
        return len(self._trusted) > 0 or int((~suspects).sum()) > 1

    def _check(
        self,
        seen: Observed,
        wrong: WrongLabels,
        columns: dict[str, tuple[Scores, Verdict]],
        groups: dict[str, np.ndarray],
        suspects: np.ndarray,
    ) -> None:
        """Train references without the suspects, and add their verdicts to ``columns``.

        A reference that finds many more suspects had learned from them; it is trained once more, without these.
        """
        canary, labels = wrong.rows, seen.labels
        misled = wrong.of(labels, seen.classes)
        rounds = 0
        while True:
            reference, trusted_logits, trusted_labels = self._reference(labels, suspects)
            rows = Rows(
                labels,
                seen.classes,
                reference=reference,
                trusted_logits=trusted_logits,
                trusted_labels=trusted_labels,
            )
            found = self._by_reference(rows, misled, canary)
            columns |= found
            more = np.any([verdict.flagged for _, verdict in found.values()], axis=0) & ~suspects
            suspects, rounds = suspects | more, rounds + 1
            if rounds == ROUNDS or more.sum() <= self._policy.target_fpr * self._size or not self._can_refer(suspects):
                break
        margins, misled_margins = (-margin(reference, y).numpy() for y in (labels, misled))
        for name, (scores, verdict) in columns.items():
            if name not in found and verdict.calibration["method"] == CANARIES:
                columns[name] = scores, confirmed(verdict, next(iter(found.values()))[1], margins)
        for name, numbers in groups.items():
            if (numbers >= 0).any():
                verdict = by_exclusion(numbers, margins, margins[canary], misled_margins[canary], labels.numpy())
                columns[name] = columns[name][0], verdict

    def _by_reference(self, rows: Rows, misled: Tensor, canary: np.ndarray) -> dict[str, tuple[Scores, Verdict]]:
        """Scores and verdict of each trusted margin, or, without one, of the plain margin.

        The canaries were held out of the reference, so that any label can be tried on them: where suspects are found,
        they are judged once more against canaries that bear labels such as the suspects do.
        """
        reference = rows.reference
        assert reference is not None  # noqa: S101
        trusting = {name: method for name, method in self._filters.items() if "trusted" in method.needs}

        def judged(*wrong: Tensor) -> dict[str, tuple[Scores, Verdict]]:
            scored: dict[str, tuple[Scores, list[Tensor], np.ndarray | None]] = {}
            if trusting and rows.trusted_labels is not None:
                held_out = replace(rows, labels=rows.trusted_labels, reference=rows.trusted_logits, trusted_logits=None)
                for name, method in trusting.items():
                    known = [method(replace(rows, labels=labels)).values for labels in wrong]
                    scored[name] = method(rows), known, method(held_out).values.numpy()
            else:
                own = Scores(-margin(reference, rows.labels))
                scored[REFERENCE] = own, [-margin(reference, labels) for labels in wrong], None
            return {
                name: (
                    scores,
                    by_canaries(
                        scores.values.numpy(),
                        canary,
                        target_fpr=self._policy.target_fpr,
                        min_power=self._policy.min_power,
                        canary_scores=np.concatenate([values.numpy()[canary] for values in known]),
                        null=null,
                    ),
                )
                for name, (scores, known, null) in scored.items()
            }

        where, own = torch.from_numpy(canary), rows.labels.numpy()
        held_out, misled_margins = reference[where], -margin(reference, misled)[where]
        found = judged(misled)
        sure = np.any([verdict.flagged for _, verdict in found.values()], axis=0)
        if len(held_out):  # of those less suspicious, too many are hard rows, whose labels are no noise
            sure &= (-margin(reference, rows.labels) > misled_margins.median()).numpy()
        if sure.sum() < LEAST_CANARIES:
            return found
        by_label = [-margin(held_out, torch.full((len(held_out),), label)) for label in range(rows.classes)]
        as_sure = (torch.stack(by_label, 1) > misled_margins.median()).numpy()
        seen = reference.argmax(1).numpy()
        draws = min(DRAWS, rows.classes - 1)  # with two classes there is one wrong label
        alike = labels_like(
            seen[sure], own[sure], seen[canary], as_sure, own[canary], draws=draws, seed=self._probe.seed
        )
        every = []
        for labels in alike:
            wrong = misled.clone()
            wrong[where] = torch.from_numpy(labels)
            every.append(wrong)
        return judged(*every)

    def _reference(self, labels: Tensor, suspects: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of all N rows, and of the trusted ones by models that did not see them, with their labels."""
        n = self._size
        if not len(self._trusted):
            rank_zero_info(f"DataFilter: training a reference without {int(suspects.sum())} suspect rows.")
            return self._trained_on(np.flatnonzero(~suspects), 1).logits, None, None
        folds = np.random.default_rng(self._probe.seed).permutation(len(self._trusted)) % FOLDS
        total, held_out, held_labels = torch.zeros(()), [], []
        for fold in range(FOLDS):
            known = self._trusted[folds != fold]
            rank_zero_info(f"DataFilter: training a reference on {len(known)} trusted rows and what they vouch for.")
            first = self._trained_on(known, 1 + 2 * fold)
            agree = (first.logits.argmax(1) == first.labels).numpy()[:n] & ~suspects
            agree[self._trusted[self._trusted < n]] = False
            second = self._trained_on(np.concatenate([np.flatnonzero(agree), known]), 2 + 2 * fold)
            total = total + second.logits[:n] / FOLDS
            rows = torch.from_numpy(self._trusted[folds == fold])
            held_out.append(second.logits[rows])
            held_labels.append(second.labels[rows])
        return total, torch.cat(held_out), torch.cat(held_labels)

    def _trained_on(self, rows: np.ndarray, seed: int) -> Observed:
        train = self._for_training(Subset(self._all, rows.tolist()))
        return self._fit(self._all, frozenset(), wrong=None, train=train, seed=seed)
