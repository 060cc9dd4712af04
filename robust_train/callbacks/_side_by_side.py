"""What a defence seems to bring beside what it brings: three robust evaluations of the same batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from robust_train.callbacks.robust_evaluation import RobustEvaluation
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.gain import Gain
from robust_train.evasion.threat import Threat

if TYPE_CHECKING:
    import pytorch_lightning as pl

Adapt = Callable[[Attack, bool], Attack]
PARTS = ("undefended", "apparent", "adaptive")


class _Part(RobustEvaluation):
    """One of the three."""

    def measured(self) -> tuple[float, int] | None:
        """Robust accuracy and how many examples it is of; None where nothing was measured."""
        mean = self._means.get("robust_acc")
        return None if mean is None else (float(mean.compute()), round(float(mean.weight)))  # type: ignore[arg-type]


class SideBySide:
    """Robust accuracy without a defence, with it against a naive attack, and with it against one that knows of it.

    Args:
        attack: the naive attack.
        adapt: makes of an attack one that knows of the defence; the second argument says whether somebody else averages
            over what the defence draws.
        without: inside, the module is undefended.
        fairly: attack the undefended module adaptively too, where the defence leaves its marks on it.
        threat: what the attacks may do.
        settings: of ``RobustEvaluation``: ``every_n_epochs``, ``limit_batches``, ``inputs``, ``labels``, ``logits``.
    """

    def __init__(
        self,
        attack: Attack,
        adapt: Adapt,
        without: Callable[[Any], AbstractContextManager[None]],
        threat: Threat,
        settings: dict[str, Any],
        fairly: bool = False,
    ) -> None:
        self.gain: Gain | None = None
        self._adapt, self._without = adapt, without
        naive = {"naive": attack}
        adaptive = {**naive, "adaptive": adapt(attack, False)}
        attacks = {"undefended": adaptive if fairly else naive, "apparent": naive, "adaptive": adaptive}
        self._parts = {
            name: _Part(attacks[name], threat, name=name, checks=False, draws=1, **settings) for name in PARTS
        }
        self._adapted: list[tuple[RobustEvaluation, dict[str, Attack]]] = []

    def adapt_others(self, trainer: Any, stage: str) -> None:
        """Every ``RobustEvaluation`` of the Trainer counts adaptive attacks too, until ``restore_others``."""
        self.restore_others()
        for other in trainer.callbacks:
            if isinstance(other, RobustEvaluation):
                self._adapted.append((other, other.attacks))
                asked = other.settings()
                averaged = stage == "test" and (asked["checks"] if asked["draws"] is None else asked["draws"] > 1)
                more = {f"{name}_adaptive": self._adapt(attack, averaged) for name, attack in other.attacks.items()}
                other.attacks = {**other.attacks, **more}

    def restore_others(self) -> None:
        """The evaluations have the attacks again that the user gave them."""
        for other, attacks in self._adapted:
            other.attacks = attacks
        self._adapted = []

    def start(self, trainer: Any, module: pl.LightningModule, stage: str) -> None:
        """A validation or test begins."""
        for part in self._parts.values():
            (part.on_test_start if stage == "test" else part.on_validation_start)(trainer, module)

    def batch(self, trainer: Any, module: pl.LightningModule, batch: Any, place: tuple[int, int], stage: str) -> None:
        """A batch of it is about to be evaluated."""
        for name, part in self._parts.items():
            event = part.on_test_batch_start if stage == "test" else part.on_validation_batch_start
            with self._without(module) if name == "undefended" else nullcontext():
                event(trainer, module, batch, *place)

    def end(self, trainer: Any, module: pl.LightningModule, stage: str) -> None:
        """It ends: log the three and both gains."""
        prefix = "test" if stage == "test" else "val"
        found = {name: part.measured() for name, part in self._parts.items() if part.active}
        for part in self._parts.values():
            (part.on_test_epoch_end if stage == "test" else part.on_validation_epoch_end)(trainer, module)
        undefended, apparent, adaptive = (found.get(name) for name in PARTS)
        if trainer.sanity_checking or undefended is None or apparent is None or adaptive is None:
            return
        self.gain = Gain(undefended[0], apparent[0], adaptive[0], undefended[1])
        module.log(f"{prefix}/apparent_gain", self.gain.apparent_gain, add_dataloader_idx=False)
        module.log(f"{prefix}/adaptive_gain", self.gain.adaptive_gain, add_dataloader_idx=False)
        rank_zero_info(f"{prefix}: robust accuracy {self.gain}. Only the adaptive number counts.")
