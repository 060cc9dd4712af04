"""What ``RobustEvaluation`` measures in a test run beyond its metrics: intervals, flags, corruptions, examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import get
from robust_train.callbacks._checks import check_counts, check_places, check_switches, check_texts
from robust_train.callbacks._step import StepVictim
from robust_train.evasion.attacks.base import Attack, what_holds
from robust_train.evasion.corruptions import Corruptions
from robust_train.evasion.draws import in_draws
from robust_train.evasion.evaluate import outcomes_of, plan
from robust_train.evasion.examples import AdversarialExamples
from robust_train.evasion.outcomes import Evaluation, Outcomes, summary, together
from robust_train.evasion.probing import needed_draws, sanity_checks
from robust_train.evasion.sanity_checks import Flag
from robust_train.evasion.shards import Shards, data_digest
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim


@dataclass(frozen=True)
class AtTest:
    """What is asked for in ``test``; see ``RobustEvaluation``.

    Raises:
        ValueError: a setting is out of range.
        TypeError: ``corruptions`` are none.
    """

    groups: str | int | None = None
    corruptions: Corruptions | None = None
    checks: bool = True
    draws: int | None = None
    shards: str | None = None
    examples: int = 0

    def __post_init__(self) -> None:
        check_places("robust_evaluation", groups=self.groups)
        check_switches("robust_evaluation", checks=self.checks)
        check_counts("robust_evaluation", 1, draws=1 if self.draws is None else self.draws)
        check_counts("robust_evaluation", 0, examples=self.examples)
        check_texts("robust_evaluation", shards=self.shards)
        if self.corruptions is not None and not isinstance(self.corruptions, Corruptions):
            raise TypeError(f"robust_evaluation.corruptions must be Corruptions, or null, got {self.corruptions!r}")


class Testing:
    """One test run of a classification.

    Args:
        asked: what is measured.
        threat: what the attacker may do.
        attacks: by name.
        seed: of the attacks.
        layer: the submodule whose output is attacked; None: the input is.
    """

    def __init__(
        self, asked: AtTest, threat: Threat, attacks: Mapping[str, Attack], seed: int, layer: str | None
    ) -> None:
        self._asked, self._threat, self._attacks, self._seed, self._layer = asked, threat, attacks, seed, layer
        self._parts: list[Outcomes] = []
        self._flags: tuple[Flag, ...] = ()
        self._draws = 0
        self._shards: Shards | None = None
        self._rows = 0
        self.examples: AdversarialExamples | None = None

    def judge(
        self, trainer: Any, module: nn.Module, victim: StepVictim, x: Tensor, threat: Threat, place: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Attack and measure one batch.

        Args:
            trainer: that runs the test.
            module: the LightningModule.
            victim: its step with this batch; it has logits and labels.
            x: what is attacked ``(B, ...)``.
            threat: as it holds for this batch.
            place: numbers of the loader and of the batch.

        Returns:
            What is to be logged, a value an example: ``"clean_acc"``, ``"robust_acc"``, ``"robust_acc_<attack>"``, and
            ``"corruption_acc"`` where it is measured.
        """
        rank = _seams.data_rank(trainer)
        if not self._draws:
            self._begin(trainer, module, victim, x, threat)
        groups = self._groups(victim, len(x))
        judged, attacks = in_draws(victim, self._attacks, self._draws)
        left = max(self._asked.examples - self._rows, 0) if rank == 0 else 0
        seed = (self._seed, rank, *place)

        def run() -> Outcomes:
            return outcomes_of(
                judged, x, threat, attacks, *seed, corruptions=self._asked.corruptions, groups=groups, examples=left
            )

        if self._shards is None:
            outcomes = run()
        else:
            digest = data_digest(x, victim.known_labels(), groups)
            outcomes = self._shards.judged(f"{rank}-{place[0]}-{place[1]:06d}", digest, run)
        self._parts.append(outcomes)
        self._rows += len(x)
        return {name: values.to(x.device) for name, values in _logged(outcomes.scores).items()}

    def evaluation(self, trainer: Any) -> Evaluation | None:
        """All batches of all processes together; None where there were none."""
        mine = (self._parts, self._flags)
        gathered: list[Any] = [mine]
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, mine)
        parts = [part for of_rank, _ in gathered for part in of_rank]
        if not parts:
            return None
        flags = {flag.name: flag for _, of_rank in reversed(gathered) for flag in of_rank}
        every = together(parts)
        within = what_holds(self._attacks.values(), self._threat, self._layer)
        if every.examples:
            self.examples = AdversarialExamples.of(every.examples, list(self._attacks), within)
        checked = self._asked.checks
        return summary(every, threat=within, flags=flags.values(), checked=checked, draws=self._draws or 1)

    def _begin(self, trainer: Any, module: nn.Module, victim: StepVictim, x: Tensor, threat: Threat) -> None:
        """With the first batch: sanity checks, and the shards' folder."""
        if self._asked.checks:
            training = [
                name or type(module).__name__
                for name, part in module.named_modules()
                if part.training and not isinstance(part, Metric)
            ]
            self._flags = sanity_checks(
                victim, x, threat, outputs=_outputs, training=training, draws=self._asked.draws, seed=self._seed
            )
            for flag in self._flags:
                rank_zero_info(f"RobustEvaluation: {flag}")
        flags = self._flags if self._asked.checks else None
        self._draws = self._asked.draws or needed_draws(victim, x, flags, seed=self._seed)
        if self._asked.shards is not None:
            if _seams.sharded(trainer):
                raise ValueError("robust_evaluation.shards: a model that is split over processes is judged in one go")
            settings = plan(
                module,
                self._threat,
                self._attacks,
                self._seed,
                self._draws,
                corruptions=self._asked.corruptions,
                examples=self._asked.examples,
            )
            self._shards = Shards(self._asked.shards, settings)

    def _groups(self, victim: StepVictim, size: int) -> tuple[str, ...] | None:
        asked = self._asked.groups
        if asked is None:
            return None
        for path in [(asked,), tuple(str(asked).split("."))]:
            try:
                part = get(victim.batch, path)
            except (KeyError, IndexError, AttributeError, TypeError):
                continue
            names = part.tolist() if isinstance(part, Tensor) else list(part)
            if len(names) == size:
                return tuple(map(str, names))
        raise ValueError(f"robust_evaluation.groups={asked!r} names no part of the batch with one group an example")


def _outputs(victim: Victim, x: Tensor) -> Tensor:
    """What the module of the logits returns, before probabilities become logits."""
    assert isinstance(victim, StepVictim)  # noqa: S101  (the checks hand back a part of what they were given)
    seen: list[Tensor] = []
    with victim.layout.watched(seen.append):
        victim.logits(x)
    return seen[0]


def _logged(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    attacked = {name.removeprefix("attack/"): values for name, values in scores.items() if name.startswith("attack/")}
    values = {"clean_acc": scores["clean"], "robust_acc": torch.stack([scores["clean"], *attacked.values()]).amin(0)}
    values |= {f"robust_acc_{name}": score for name, score in attacked.items()}
    corrupted = [score for name, score in scores.items() if name.startswith("corruption/")]
    return values | ({"corruption_acc": torch.stack(corrupted).mean(0)} if corrupted else {})
