"""A few training batches of each epoch, kept to be attacked when the epoch ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, fresh, get, label_candidates
from robust_train.callbacks._callback import submodule
from robust_train.callbacks._layer import kind_of
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, find_logits
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.evaluate import judge
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl


class TrainingBatches:
    """The first batches of an epoch, as the training step receives them.

    Args:
        owner: the callback's name in messages.
        count: how many.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        layer: see ``AdversarialTraining``.
    """

    def __init__(
        self,
        owner: str,
        count: int,
        inputs: str | int | None,
        labels: str | int | None,
        logits: str | None,
        layer: str | None,
    ) -> None:
        self._owner, self._count, self._inputs, self._labels = owner, count, inputs, labels
        self._logits, self._layer = logits, layer
        self._kept: list[tuple[int, Any]] = []
        self._layout: Layout | None = None

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """To be called with every batch before it is trained on: the first ones are copied.

        Raises:
            ValueError: the task has no classes.
        """
        if batch_idx == 0:
            self._kept = []
        if batch_idx >= self._count:
            return
        self._kept.append((batch_idx, fresh(batch)))
        if self._layout is None:
            with _tracked(trainer):
                self._layout = self._look(trainer, module, *self._kept[-1])

    def judged(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        threat: Threat,
        attacks: Mapping[str, Attack],
        *seed: int | str,
    ) -> dict[str, float] | None:
        """Attack the kept batches through the user's own training step, in eval mode.

        Args:
            trainer: the run's.
            module: the run's.
            threat: what the attacker may do.
            attacks: attacks by name.
            seed: parts of the seed; see ``judge``.

        Returns:
            Accuracy under each attack, under all of them (``"worst"``), and without (``"clean"``), over all
            processes; None where the step skipped every batch.
        """
        names = ["clean", "worst", *attacks]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        layout = self._layout
        for batch_idx, batch in self._kept if layout is not None else ():
            assert layout is not None  # noqa: S101
            with _tracked(trainer):
                victim = self._victim(trainer, module, batch_idx, batch, layout, not _seams.sharded(trainer))
                try:
                    within, x = victim.within(threat), victim.clean()
                    found = judge(victim, x, within, attacks, *seed, _seams.data_rank(trainer), batch_idx)
                except StepSkipped:
                    continue
            scores: list[Tensor] = [found.clean, found.worst, *(found.attacked[name] for name in attacks)]
            sums += torch.stack([*(s.double().sum().cpu() for s in scores), torch.tensor(len(x)).double()])
        # some devices have no float64; counts of a few batches are exact in float32
        *totals, n = trainer.strategy.reduce(sums.float().to(module.device), reduce_op="sum").tolist()
        return {name: total / n for name, total in zip(names, totals, strict=True)} if n else None

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int, batch: Any) -> Layout | None:
        path = find_input(batch, self._inputs)
        candidates = label_candidates(batch, path, self._labels)
        layer = None if self._layer is None else submodule(module, self._layer, "layer")
        first = candidates[0] if candidates else None
        layout = Layout(path, first, candidates=candidates, layer=layer, layer_name=self._layer or "")
        named = None if self._logits is None else submodule(module, self._logits)
        try:
            found = find_logits(self._victim(trainer, module, batch_idx, batch, layout, False), module, named)
        except StepSkipped:
            return None
        if found is None:
            raise ValueError(
                f"{self._owner} counts right answers, and no logits with class labels were found in the training "
                'step: where the attack is set up, name the submodule that returns the logits with logits="…" and the '
                f'labels with labels="…"; for a task without classes leave {self._owner} out'
            )
        return found

    def _victim(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch_idx: int, batch: Any, layout: Layout, stop: bool
    ) -> StepVictim:
        step = _seams.own_step(module)
        return kind_of(layout)(
            module,
            lambda b: step(b, *_seams.step_arguments(step, batch_idx, 0)),
            batch,
            layout,
            Sandbox(module, trainer, get(batch, layout.input_path).device),
            own_loss=layout.logits_module is None,
            gradient_scale=_seams.gradient_scale(trainer),
            stop_when_fooled=stop,
        )


@contextmanager
def _tracked(trainer: pl.Trainer) -> Iterator[None]:
    """Inside, gradients are tracked, in the run's precision."""
    with torch.inference_mode(False), torch.enable_grad(), _seams.autocast_context(trainer, "validation"):
        yield
