"""Every batch of a run held against a schema, before the module sees it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core import rank_zero
from torch import Tensor
from torch.utils.data import Dataset

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, plain
from robust_train.callbacks._dp_run import run_folder
from robust_train.callbacks._rows import Place, Rows, find_rows, is_through, leaves, trusted_batches, write_quarantine
from robust_train.callbacks._validation_refusals import check_settings, refuse_what_cannot_work, with_shares_of
from robust_train.evasion.randomness import preserved_rng
from robust_train.poisoning.checks import DataViolation, SeenRows, Violation, check, check_shares
from robust_train.poisoning.infer import Observation, infer, observe
from robust_train.poisoning.schema import Schema

if TYPE_CHECKING:
    import pytorch_lightning as pl


class DataValidation(Callback):
    """Holds every batch of ``fit`` against a schema; the module, its data and its Trainer stay as they are.

    A batch is checked as the training step will see it: collated, on its device, after all transfer hooks. What each
    rule means is said in ``Schema``. The order of work for one batch::

        transfer to the device, on_after_batch_transfer
        dtype, shape, finite, range, constant, label_dtype, label_shape, labels, conflicts      # this callback
        on_train_batch_start, training_step, …                                                 # untouched
        … at the end of the epoch: balance, and data/violations is logged

    Args:
        schema: the path of a yaml file, a ``Schema``, or ``"infer"``. An inferred schema is written to the run's folder
            as ``data_schema.yaml``, to be read, corrected, and given to the next run.
        infer_batches: how many trusted batches a schema is inferred from.
        mode: ``"strict"``: a violation raises ``DataViolation`` before any hook sees the batch. ``"quarantine"``: the
            rows at fault are taken out of the batch, and listed in ``validation_quarantine.csv`` in the run's folder
            with a digest of their content. Where no row is left the training step is not called, as if it had returned
            None. Violations of ``balance`` have no rows; they warn.
        inputs: which part of the batch is checked: an index, a name, or a dotted path (``"views.0"``). None: a tensor
            named like an input, else the first tensor with at least two dimensions, else the first tensor.
        labels: where the labels are; None: the likeliest tensor with as many rows.
        check_val: the batches of ``fit``'s validation are checked too, by the rules that judge a row alone.
        trusted: what to infer from: a dataset (rows spread evenly over it), or a loader or list of batches such as the
            train loader's. None: the first training batches of the run are trusted, and a line in the log says so; they
            are checked for NaN and infinities only, and validation before or between them is not checked.
        skip: rules that are left out.
        remember_rows: how many rows of an epoch ``conflicts`` remembers, at about 200 bytes each.
        manifest: path of a data manifest (``robust-train manifest``), whose class counts the balance is held against,
            in place of the schema's shares.
        name: where several validations stand in one Trainer (one for each loader, or for each input): part of the
            names of their files and metrics.

    Raises:
        ValueError: a setting is out of range, or the schema file is no schema. In ``setup``: what cannot be combined.
        DataViolation: data do not fit the schema; the message names batch, rule, rows and values.

    Note:
        Digests for ``conflicts`` need every row's bytes on the CPU (about 1.5 GB/s); ``skip=["conflicts"]`` saves that.
        Rows are equal to the bit or not: random augmentation before the step hides them. Each process of a distributed
        run checks its own batches, and its own share of ``conflicts`` and ``balance``; after a resume within an epoch,
        ``conflicts`` begins anew. In quarantine a list or tensor that only happens to be as long as the batch loses
        those rows too. On a batch of which no row is left, hooks of the module see it as it came.

    Guarantees:
        As long as no row is taken out, training is bit-identical to training without this callback; no random number
        is drawn. With a given schema or trusted data, no row at fault reaches the training step. After
        ``fit``, also a failed one, module and Trainer are as before.

    Example::

        trainer = Trainer(callbacks=[DataValidation(trusted=checked_by_hand, mode="quarantine")])
    """

    defends = True

    def __init__(
        self,
        schema: Schema | str | Path = "infer",
        infer_batches: int = 8,
        mode: str = "strict",
        inputs: str | int | None = None,
        labels: str | int | None = None,
        check_val: bool = True,
        trusted: Dataset[Any] | Iterable[Any] | None = None,
        skip: Sequence[str] = (),
        remember_rows: int = 200_000,
        name: str = "",
        manifest: str | None = None,
    ) -> None:
        self.schema, self.infer_batches, self.mode, self.trusted = schema, infer_batches, mode, trusted
        self.inputs, self.labels, self.check_val, self.skip = inputs, labels, check_val, _names(skip)
        self.remember_rows, self.name, self.manifest = remember_rows, name, manifest
        check_settings(self)
        self.violations = self.left_out = 0  # rows, over all fits; balance counts as one
        self._schema: Schema | None = schema if isinstance(schema, Schema) else None
        if schema != "infer" and not isinstance(schema, Schema):
            self._schema = Schema.read(schema)
        self._counts: Counter[int] = Counter()  # of the labels in the epoch so far
        self._in_epoch = 0  # violations
        self._run: _Run | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def settings(self) -> dict[str, Any]:
        names = ("infer_batches", "mode", "inputs", "labels", "check_val", "skip", "remember_rows", "name", "manifest")
        return {
            "schema": self.schema.to_dict() if isinstance(self.schema, Schema) else str(self.schema),
            "trusted": None if self.trusted is None else type(self.trusted).__name__,
            **{name: plain(getattr(self, name)) for name in names},
        }

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings(),
            "schema": None if self._schema is None else self._schema.to_dict(),
            "violations": self.violations,
            "left_out": self.left_out,
            "in_epoch": self._in_epoch,
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.schema == "infer" and self.trusted is None and state_dict["schema"] is not None:
            self._schema = Schema.from_dict(state_dict["schema"])
        self.violations, self.left_out = state_dict["violations"], state_dict["left_out"]
        self._in_epoch, self._counts = state_dict["in_epoch"], Counter(state_dict["counts"])

    # --- events, in the order in which Lightning calls them ---------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self._run is not None:
            return
        refuse_what_cannot_work(trainer, pl_module, self, self._schema)
        self._run = _Run(SeenRows(self.remember_rows))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = self._running()
        run.folder = run_folder(trainer)
        run.rank = f"rank{trainer.global_rank}" if trainer.global_rank else ""
        if self.trusted is not None and self._schema is None:
            self._schema = self._from_trusted(trainer, pl_module)
        if self._schema is None:
            if trainer.is_global_zero:  # a line of the log, not a Python warning: it is what was asked for
                rank_zero.log.warning(
                    f"DataValidation: no trusted data were given, so the first {self.infer_batches} training batches "
                    "are assumed to be trustworthy, and the schema is inferred from them. Give trusted=…, or schema=… "
                    "of an earlier run, and they are checked too."
                )
            text = "the schema is inferred from the first training batches"
        else:
            self._use(trainer, self._schema)
            text = self._schema.describe()
        self.announce(trainer, f"active, {self.mode}. {text}.")

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watch(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = self._running()
        run.loaders = trainer.train_dataloader
        if leaves(run.loaders) > 1 and self.inputs is None:
            raise ValueError(
                "DataValidation checks the rows of one loader, and the training batches come from several: add one "
                "DataValidation for each, with inputs=… that leads into its batch and a name=… of its own, such as "
                'inputs="labelled.0", name="labelled"'
            )
        self._watch(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._running().seen = SeenRows(self.remember_rows)
        self._counts.clear()
        self._in_epoch = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._running().step.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run is not None:
            self._run.val_batches.clear()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = self._running()
        if self._schema is None and run.observations:
            self._infer_from_training(trainer)
        odd = None if self._schema is None or "balance" in self.skip else check_shares(self._schema, self._counts)
        if odd is not None:
            self._count(1)
            text = f"DataValidation: the training rows of epoch {trainer.current_epoch} do not fit the schema: {odd}"
            if self.mode == "strict":
                raise DataViolation(
                    f"{text}. Correct schema.shares, or leave the rule out with skip=['balance']", [odd]
                )
            warnings.warn(text, stacklevel=2)
        pl_module.log(
            f"data/{self.name}/violations" if self.name else "data/violations",
            float(self._in_epoch),
            reduce_fx="sum",
            sync_dist=trainer.world_size > 1,
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    # --- the schema -------------------------------------------------------------------------------------------------

    def _use(self, trainer: Any, schema: Schema) -> None:
        """Check by this schema from now on; what was inferred is kept in the run's folder."""
        run = self._running()
        if self.manifest is not None:
            schema = with_shares_of(schema, self.manifest)
        self._schema = schema
        run.schema = replace(
            schema, dtype=_in_precision(trainer, schema.dtype), label_dtype=_in_precision(trainer, schema.label_dtype)
        )
        if self.schema == "infer" and trainer.is_global_zero and run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
            schema.write(run.folder / self._file("data_schema", "", "yaml"))

    def _from_trusted(self, trainer: Any, module: Any) -> Schema:
        found: Any = None
        if trainer.is_global_zero:
            observations: list[Observation] = []
            with preserved_rng(module.device):
                for batch in islice(trusted_batches(self.trusted, self.infer_batches), self.infer_batches):
                    rows = find_rows(_seams.transferred(trainer, batch), self.inputs, self.labels, "trusted")
                    observations.append(observe(rows.x, rows.y))
            source = f"inferred from {sum(o.rows for o in observations)} rows of trusted data"
            found = infer(observations, source).to_dict()
        return Schema.from_dict(trainer.strategy.broadcast(found))

    def _infer_from_training(self, trainer: Any) -> None:
        run = self._running()
        gathered: list[Any] = [run.observations]
        if trainer.world_size > 1:  # every process comes here with the same batch
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, run.observations)
        observations = [o for of_rank in gathered for o in of_rank]
        rows = sum(o.rows for o in observations)
        source = f"inferred from the first {rows} training rows, on the assumption that they are trustworthy"
        self._use(trainer, infer(observations, source))
        run.observations = []
        rank_zero.rank_zero_info(f"DataValidation: {source}: {run.schema.describe()}.")

    # --- one batch --------------------------------------------------------------------------------------------------

    def _watch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = self._running()
        if not run.watching:
            run.watching = True
            run.undo.callback(_seams.exchange_batches(trainer, lambda b, i: self._exchange(trainer, module, b, i)))

    def _exchange(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, loader_idx: int) -> Any:
        """The batch that goes on to the module."""
        run = self._running()
        if batch is None:  # Lightning leaves it out
            return batch
        if _seams.fetches_training_batch(trainer):
            place = Place("training", trainer.current_epoch, _seams.micro_batches_begun(trainer))
            return self._training(trainer, module, batch, place)
        if not self.check_val or self._schema is None or not (trainer.validating or trainer.sanity_checking):
            return batch
        place = Place("validation", trainer.current_epoch, run.val_batches[loader_idx], loader_idx)
        run.val_batches[loader_idx] += 1
        rows = find_rows(batch, self.inputs, self.labels, "validation")
        kept = self._kept(rows, place, check(run.schema, rows.x, rows.y, self.skip))
        if kept is None:
            return batch
        if not len(kept):
            raise DataViolation(f"{place}: no row is left, and no validation step can be left out. Repair the data")
        return rows.kept(kept).in_batch(batch)

    def _training(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, place: Place) -> Any:
        run = self._running()
        if is_through(batch, self.inputs, run.loaders):
            return batch
        rows = find_rows(batch, self.inputs, self.labels, "training", run.loaders)
        if not run.told:
            rank_zero.rank_zero_info(f"DataValidation: checks {rows.found} of the training batches.")
            run.told = True
        kept = self._kept(rows, place, self._violations(rows))
        if kept is not None:
            if not len(kept) and trainer.world_size > 1:
                raise DataViolation(
                    f"{place}: no row is left, and in a distributed run one process cannot leave out a step that the "
                    "others wait for. Remove the rows that validation_quarantine.csv lists from the data"
                )
            if not len(kept):
                run.step.callback(_seams.leave_out_step(module))
                return batch
            rows = rows.kept(kept)
            batch = rows.in_batch(batch)
        self._learn(trainer, rows)
        return batch

    def _violations(self, rows: Rows) -> list[Violation]:
        run = self._running()
        found = check(run.schema, rows.x, rows.y, self.skip)
        if run.schema.conflicting_labels or "conflicts" in self.skip or rows.y is None:
            return found
        bad = {row for violation in found for row in violation.rows}
        good = [row for row in range(len(rows.x)) if row not in bad]
        judged = rows.kept(torch.tensor(good, dtype=torch.long)) if bad else rows
        if judged.y is not None and (conflict := run.seen.conflicts(judged.x, judged.y)):
            found.append(replace(conflict, rows=tuple(good[i] for i in conflict.rows)))
        return found

    def _kept(self, rows: Rows, place: Place, found: list[Violation]) -> Tensor | None:
        """Which rows stay; None: all."""
        if not found:
            return None
        bad = {row for violation in found for row in violation.rows}
        self._count(len(bad))
        if self.mode == "strict":
            raise DataViolation(
                f"{place} does not fit the schema: {'; '.join(map(str, found))}. Repair the data, correct the schema, "
                'or leave such rows out with mode="quarantine"',
                found,
            )
        run = self._running()
        self.left_out += len(bad)
        if run.folder is not None:
            write_quarantine(run.folder / self._file("validation_quarantine", run.rank, "csv"), place, rows, found)
        return torch.tensor([row for row in range(len(rows.x)) if row not in bad], dtype=torch.long)

    def _learn(self, trainer: pl.Trainer, rows: Rows) -> None:
        """From rows that training goes on with: what the schema is inferred from, and the shares of the classes."""
        run = self._running()
        if self._schema is None:
            run.observations.append(observe(rows.x, rows.y))
            if len(run.observations) == self.infer_batches:
                self._infer_from_training(trainer)
        if rows.y is not None and rows.y.ndim == 1 and (self._schema is None or self._schema.shares is not None):
            self._counts.update(rows.y.tolist())

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _count(self, violations: int) -> None:
        self.violations += violations
        self._in_epoch += violations

    def _file(self, stem: str, rank: str, ending: str) -> str:
        return f"{'_'.join(part for part in (stem, self.name, rank) if part)}.{ending}"

    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError("DataValidation: not within fit")
        return self._run

    def _close(self) -> None:
        if self._run is not None:
            self._run.step.close()
            self._run.undo.close()
        self._run = None


@dataclass
class _Run:
    """What is known during one ``fit``."""

    seen: SeenRows
    schema: Schema = field(default_factory=Schema)  # in the run's precision; while it is inferred: what is finite fits
    observations: list[Observation] = field(default_factory=list)
    folder: Path | None = None
    rank: str = ""  # in the names of files that each process writes
    loaders: Any = None
    val_batches: Counter[int] = field(default_factory=Counter)  # by loader
    watching: bool = False
    told: bool = False  # what is checked
    undo: ExitStack = field(default_factory=ExitStack)  # at the end of the fit
    step: ExitStack = field(default_factory=ExitStack)  # at the end of the batch


def _names(rules: Sequence[str]) -> tuple[str, ...]:
    """Rules as a tuple; what is none is told of by the check of the settings."""
    return tuple(rules) if isinstance(rules, (list, tuple, set, frozenset)) else (rules,)  # type: ignore[return-value]


def _in_precision(trainer: Any, dtype: str | None) -> str | None:
    """What a Trainer with ``precision="bf16-true"`` and the like makes of a batch's dtype."""
    if dtype is None:
        return None
    converted = trainer.precision_plugin.convert_input(torch.empty(0, dtype=getattr(torch, dtype)))
    return str(converted.dtype).removeprefix("torch.")
