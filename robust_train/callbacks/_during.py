"""How rows are judged while the run itself trains: its dynamics, after a warm-up, and a fresh start without them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._filtering import Judged
from robust_train.callbacks._observer import Observer, Places, WrongLabels
from robust_train.callbacks._recorder import Recorder
from robust_train.poisoning.decide import by_canaries, decide
from robust_train.poisoning.filters.base import Filter, Rows
from robust_train.poisoning.policy import Policy
from robust_train.poisoning.probe import Probe
from robust_train.poisoning.records import Column

if TYPE_CHECKING:
    import pytorch_lightning as pl


class Watch:
    """Watches the first epochs of a run, in which some rows, the canaries, bear a wrong label.

    Args:
        trainer: of the run.
        module: the user's LightningModule.
        size: number of rows.
        places: where things are in a batch.
        probe: how many canaries there are, and the seed that draws them.
        restart: put weights, optimizers and schedules back to where they were once the rows are judged.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, size: int, places: Places, probe: Probe, *, restart: bool
    ) -> None:
        self._trainer, self._module, self._size = trainer, module, size
        self._wrong = WrongLabels.drawn(size, probe.canaries_for(size), probe.seed)
        self._recorder = Recorder()
        self._observer = Observer(None, size, places, frozenset({"dynamics"}), self._recorder, self._wrong)
        self._restart, self._start = restart, dict[str, Any]()
        self._undo = ExitStack()
        self._undo.callback(_seams.exchange_prepared_loader(trainer, self._recorder.attach))

    def begin(self) -> None:
        """Before the first step."""
        self._observer.on_fit_start(self._trainer, self._module)
        self._undo.callback(self._observer.unwrap)
        if self._restart:
            self._start = copy.deepcopy(
                {
                    "module": self._module.state_dict(),
                    "optimizers": [o.state_dict() for o in self._trainer.optimizers],
                    "schedulers": [c.scheduler.state_dict() for c in self._trainer.lr_scheduler_configs],
                }
            )

    def epoch_begins(self) -> None:
        """Before the first batch of an epoch."""
        self._observer.on_train_epoch_start(self._trainer, self._module)

    def batch_begins(self, batch: Any, batch_idx: int) -> None:
        """Before a step."""
        self._observer.on_train_batch_start(self._trainer, self._module, batch, batch_idx)

    @property
    def epochs(self) -> int:
        """How many were watched."""
        return self._observer.epochs

    def end(self) -> None:
        """Leave the run alone."""
        self._undo.close()

    def start_again(self) -> None:
        """Forget what was learned, if that was asked for.

        To be called when the next epoch begins: whoever keeps a checkpoint or a metric of the last one then has
        weights that belong to them.
        """
        if not self._start:
            return
        self._module.load_state_dict(self._start["module"])
        for optimizer, state in zip(self._trainer.optimizers, self._start["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        configs = self._trainer.lr_scheduler_configs
        for config, state in zip(configs, self._start["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)

    def judge(self, filters: Mapping[str, Filter], policy: Policy, restored: np.ndarray) -> Judged:
        """What the epochs so far say of the rows; the same on every process."""
        margins, losses, labels = self._gathered()
        canary, unseen = self._wrong.rows, (labels < 0).numpy()
        classes = self._observer.classes
        rows = Rows(labels.clamp_min(0), classes, losses=losses, margins=margins)
        columns = []
        for name, method in filters.items():
            scores = method(rows).values.numpy()
            verdict = by_canaries(scores, canary, target_fpr=policy.target_fpr, min_power=policy.min_power)
            verdict.flagged[unseen] = False
            columns.append(Column(name, scores, verdict.threshold, verdict.flagged, verdict.calibration))
        outcome = decide(
            {c.name: c.flagged for c in columns},
            {c.name: c.scores for c in columns},
            rows.labels.numpy(),
            policy,
            restored,
        )
        cost = {"epochs": len(margins), "canaries": int(canary.sum()), "rows_never_drawn": int(unseen.sum())}
        return Judged(rows.labels.numpy(), classes, columns, outcome, cost)

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Margins and losses ``(epochs, N)`` and labels ``(N,)`` as all processes saw them; -1 where no one did."""
        margins, losses, labels = self._observer.dynamics
        if self._trainer.world_size == 1:
            return margins, losses, labels
        device = self._trainer.strategy.root_device
        seen = (~margins.isnan()).float().to(device)
        stacked = torch.stack([margins.nan_to_num(), losses.nan_to_num()]).to(device)
        counts = self._trainer.strategy.reduce(seen, reduce_op="sum")
        total = self._trainer.strategy.reduce(stacked, reduce_op="sum")
        named = self._trainer.strategy.reduce((labels + 1).float().to(device), reduce_op="max")
        mean = torch.where(counts > 0, total / counts.clamp_min(1), torch.nan).cpu()
        return mean[0], mean[1], named.long().cpu() - 1
