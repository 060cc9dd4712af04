"""How well members of the training data can be told from others by the losses of the trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import ConcatDataset, Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._callback import Callback, plain
from robust_train.callbacks._checks import check_counts, check_places, check_texts
from robust_train.callbacks._dp_run import run_folder
from robust_train.callbacks._layout import Places
from robust_train.callbacks._membership import (
    AUDIT_FILE,
    EXPOSED_FILE,
    Audit,
    Pool,
    as_json,
    as_table,
    audit,
    write_exposed,
)
from robust_train.callbacks._poisson import PoissonLoader
from robust_train.callbacks._references import STARTS, Training, Weights, rows_of, snapshot
from robust_train.custody._files import write_whole
from robust_train.privacy.attacks.base import MembershipAttack
from robust_train.privacy.attacks.lira_offline import LiRAOffline
from robust_train.privacy.attacks.lira_online import LiRAOnline
from robust_train.privacy.attacks.loss_threshold import LossThreshold
from robust_train.privacy.attacks.rmia import RMIA
from robust_train.privacy.output.base import OutputPerturbation

if TYPE_CHECKING:
    import pytorch_lightning as pl

PRESETS = {"quick": 1, "standard": 4, "thorough": 16}  # reference models
HOLDOUTS = ("val", "test", "both")
TRIAL = 32  # rows of each kind in a fast_dev_run


class MembershipAudit(Callback):
    """Audits the trained model: can its losses tell who was in the training data?

    When training is over and every other callback has left the module, losses of members and non-members are read
    through the module's own training step, one example at a time or, where that gives the same, in batches. Reference
    models, copies of the module that learn from random halves of all these rows, tell how hard each row is. Logged:

    * ``audit/auc``: area under the ROC curve of the strongest attack; 0.5 is guessing;
    * ``audit/tpr_at_fpr_0.01`` and ``audit/tpr_at_fpr_0.001``: its true-positive rates, where there are enough
      non-members to measure them;
    * ``audit/<attack>/auc`` and so on for each attack, ``audit/<output>/<attack>/auc`` for each output perturbation.

    ``audit.json`` in the run folder has these with their intervals. The members that are most exposed are in
    ``most_exposed.csv``, which only its owner can read, and nowhere else.

    Args:
        preset: ``"quick"``: one reference, loss threshold and RMIA, on the half of the rows that it did not learn from;
            ``"standard"``: four references, also LiRA offline; ``"thorough"``: 16, also LiRA online.
        references: how many reference models; None: what the preset says. 0: the loss threshold alone.
        epochs: that each is trained; None: as many as the run had.
        start: of the references: ``"reset"``: every layer draws its parameters anew; ``"initial"``: the weights that
            training began with, for a model that was pretrained on public data.
        holdout: non-members: ``"val"``, ``"test"``, ``"both"``, or a dataset that gives samples as the train set does.
        attacks: by name; None: what the preset says.
        outputs: perturbations of the model's answers by name, under which everything is measured again.
        cache: folder that keeps references for audits to come; None: nothing is kept. A reference is taken from it when
            module, settings, data and seed are the same, as far as they can be seen.
        max_rows: members, and non-members, that are audited; None: all.
        exposed: lines of ``most_exposed.csv``; 0: no such file.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        seed: of the references.

    Raises:
        ValueError: a setting is out of range; before training: there are no non-members, or what trains cannot be
            audited.
        TypeError: an attack or output perturbation is none.

    Note:
        References learn through the module's own step, without the run's callbacks: a model that was trained with
        DP-SGD or against attacks is compared with ordinary ones. Weights that ``ModelCheckpoint`` chose are audited by
        ``robust-train audit ckpt=FILE``.

    Guarantees:
        The module, its data and the global random generators are as before. An audit without references takes one pass
        over the rows; one with R takes about R trainings on half of them.

    References:
        Carlini et al., "Membership Inference Attacks From First Principles", 2022; Zarifzadeh, Liu and Shokri,
        "Low-Cost High-Power Membership Inference Attacks", 2024.

    Example::

        trainer = Trainer(callbacks=[MembershipAudit("standard")])
    """

    def __init__(
        self,
        preset: str = "standard",
        references: int | None = None,
        epochs: int | None = None,
        start: str = "reset",
        holdout: Any = "val",
        attacks: Mapping[str, MembershipAttack] | None = None,
        outputs: Mapping[str, OutputPerturbation] | None = None,
        cache: str | None = None,
        max_rows: int | None = None,
        exposed: int = 100,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, choices in (("preset", preset, tuple(PRESETS)), ("start", start, STARTS)):
            if value not in choices:
                raise ValueError(
                    f"membership_audit.{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}"
                )
        if (isinstance(holdout, str) and holdout not in HOLDOUTS) or not hasattr(holdout, "__getitem__"):
            raise ValueError(f"membership_audit.holdout must be {', '.join(HOLDOUTS)} or a dataset, got {holdout!r}")
        rows, long = 1 if max_rows is None else max_rows, 1 if epochs is None else epochs
        count = PRESETS[preset] if references is None else references
        check_counts("membership_audit", 1, max_rows=rows, epochs=long)
        check_counts("membership_audit", 0, references=count, exposed=exposed, seed=seed)
        check_places("membership_audit", inputs=inputs, labels=labels)
        check_texts("membership_audit", logits=logits, cache=cache)
        self.preset, self.references, self.epochs, self.start = preset, references, epochs, start
        self.holdout, self.cache, self.max_rows, self.exposed = holdout, cache, max_rows, exposed
        self.inputs, self.labels, self.logits, self.seed = inputs, labels, logits, seed
        self.attacks = attacks_for(count) if attacks is None else _named("attacks", attacks, MembershipAttack)
        self.outputs = {} if outputs is None else _named("outputs", outputs, OutputPerturbation)
        if not self.attacks:
            raise ValueError("membership_audit.attacks must hold at least one attack")
        for name, attack in self.attacks.items():
            if attack.references > count:
                raise ValueError(
                    f"membership_audit.attacks.{name}: {type(attack).__name__} needs at least {attack.references} "
                    f"reference model(s), and there are {count}: set references"
                )
        self.result: dict[str, Any] | None = None
        self._count = count
        self._initial: Weights | None = None
        self._loader: Any = None
        self._undo = ExitStack()

    def settings(self) -> dict[str, Any]:
        names = (
            *("preset", "references", "epochs", "start", "holdout", "attacks", "outputs", "cache", "max_rows"),
            *("exposed", "inputs", "labels", "logits", "seed"),
        )
        return {name: plain(getattr(self, name)) for name in names}

    # --- events ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if (reason := _seams.unsupported_strategy(trainer)) is not None:
            raise ValueError(f"MembershipAudit cannot work with {reason}")
        if self._initial is None:
            self.begin_from(pl_module)
        others = trainer.callbacks  # type: ignore[attr-defined]
        # The last of all, wherever the user put it: when others have taken their hooks out of the module. A new list,
        # because this one is being walked through.
        trainer.callbacks = [*(c for c in others if c is not self), self]  # type: ignore[attr-defined]
        self._undo.callback(setattr, trainer, "callbacks", others)

    def begin_from(self, module: pl.LightningModule) -> None:
        """Take the module's weights for those that training began with; ``setup`` does so unless it was done before."""
        self._initial = snapshot(module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _seams.sharded(trainer):
            raise ValueError("MembershipAudit cannot copy a sharded module: audit a checkpoint of it on one device")
        others = self._others(trainer)
        self.announce(
            trainer,
            f"active. After training, {self._count} reference model(s) are trained on halves of the training rows and "
            f"{len(others)} others.",
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loader = _train_loader(trainer)
        rows_of(self._loader)  # now, and not when training is over

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        try:
            if self._loader is None:  # nothing was trained: what is given is audited
                self._loader = _train_loader(trainer)
            _seams.wait_for_first(trainer, lambda: self._audit(trainer, pl_module))
        finally:
            self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()

    # --- work -----------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        self._undo.close()
        self._loader, self._initial = None, None

    def _others(self, trainer: Any) -> Any:
        """Non-members, as one dataset."""
        if not isinstance(self.holdout, str):
            return self.holdout
        found = []
        if self.holdout in ("val", "both"):
            found.append(_seams.validation_dataset(trainer))
        if self.holdout in ("test", "both"):
            source = trainer.lightning_module if trainer.datamodule is None else trainer.datamodule
            if trainer.datamodule is not None:
                source.setup("test")
            found.append(getattr(source.test_dataloader(), "dataset", None))
        if any(dataset is None or not hasattr(dataset, "__len__") for dataset in found):
            raise ValueError(
                f"MembershipAudit needs non-members, and holdout={self.holdout!r} has no map-style dataset: give "
                "the run a validation or test loader, or a dataset: MembershipAudit(holdout=dataset)"
            )
        return found[0] if len(found) == 1 else ConcatDataset(found)

    def _audit(self, trainer: Any, module: Any) -> None:
        folder = run_folder(trainer)
        (members, batch_size), others = rows_of(self._loader), self._others(trainer)
        epochs = self.epochs or max(1, trainer.current_epoch)
        if trainer.fast_dev_run:
            members, others = (Subset(d, range(min(TRIAL, len(d)))) for d in (members, others))
            epochs = 1
        pool = Pool.of(members, others, self.max_rows, self.seed)
        training = Training(epochs, self.start, self._initial or {}, batch_size, self._loader, self.seed)
        rank_zero_info(f"MembershipAudit: training {self._count} reference model(s) of {epochs} epoch(s).")
        found = audit(
            trainer,
            module,
            pool,
            count=self._count,
            training=training,
            attacks=self.attacks,
            outputs=self.outputs,
            places=Places(inputs=self.inputs, labels=self.labels, logits=self.logits),
            cache=None if self.cache is None or trainer.fast_dev_run else Path(self.cache),
        )
        self.result = as_json(
            found, pool, self.attacks, self.outputs, references=self._count, reference_epochs=epochs, seed=self.seed
        )
        if not found.way.additive:
            rank_zero_warn(
                "MembershipAudit: the training step's loss of a batch is neither the mean nor the sum of its "
                "examples' losses; what is audited is the loss of each example alone."
            )
        self._log(trainer, found)
        print(as_table(found, pool))
        if trainer.fast_dev_run:
            print("(fast_dev_run: a trial on a few rows, whose figures mean nothing)")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / AUDIT_FILE, json.dumps(self.result, indent=2) + "\n")
            if self.exposed:
                write_exposed(folder / EXPOSED_FILE, found, pool, self.exposed)

    def _log(self, trainer: Any, found: Audit) -> None:
        """Past ``module.log``, which has ended with the loop."""
        metrics = _metrics("audit", found.leakage[found.worst])
        for name, leakage in found.leakage.items():
            metrics |= _metrics(f"audit/{name}", leakage)
        for output, measured in found.perturbed.items():
            for name, leakage in measured.items():
                metrics |= _metrics(f"audit/{output}/{name}", leakage)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()


def attacks_for(references: int) -> dict[str, MembershipAttack]:
    """The attacks that can do something with so many references."""
    found: dict[str, MembershipAttack] = {"loss_threshold": LossThreshold()}
    if references >= 1:
        found["rmia"] = RMIA()
    if references >= PRESETS["standard"]:
        found["lira_offline"] = LiRAOffline()
    if references >= PRESETS["thorough"]:
        found["lira_online"] = LiRAOnline()
    return found


def _named(setting: str, given: Any, kind: type) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"membership_audit.{setting} must be by name, got {given!r}")
    for name, value in given.items():
        if not isinstance(value, kind):
            raise TypeError(f"membership_audit.{setting}.{name} must be a robust_train {kind.__name__}, got {value!r}")
    return {str(name): value for name, value in given.items()}


def _metrics(prefix: str, leakage: Any) -> dict[str, float]:
    rates = {f"{prefix}/tpr_at_fpr_{fpr:g}": rate.value for fpr, rate in leakage.tpr.items() if rate is not None}
    return {f"{prefix}/auc": leakage.auc, **rates}


def _train_loader(trainer: Any) -> Any:
    """The train loader that is in use, or the one that Poisson sampling stands in for."""
    loader = trainer.train_dataloader
    return _seams.train_loader_before(trainer, 2) if isinstance(loader, PoissonLoader) else loader
