"""Helper-based adversarial training: far examples with a plainly trained helper's labels keep the margin small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust_train.callbacks._callback import plain
from robust_train.callbacks._checks import check_counts, check_texts, refuse_beside
from robust_train.callbacks._helper import as_helper, learned_weights, loaded_weights
from robust_train.callbacks._step import StepVictim
from robust_train.callbacks.adversarial_training import AdversarialTraining, Crafted
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.objectives.trades import TRADES
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import classification_loss

if TYPE_CHECKING:
    import pytorch_lightning as pl


def helper_labels(logits: Tensor) -> Tensor:
    """The classes that a helper predicts: ``(B, ...)`` indices, or 0 and 1 for one score an example.

    Args:
        logits: ``(B, classes, ...)``, or ``(B,)`` or ``(B, 1)``.
    """
    if logits.ndim < 2 or logits.shape[1] == 1:
        return (logits > 0).long()
    return logits.argmax(1)


class HelperTraining(AdversarialTraining):
    """TRADES plus ``gamma * cross-entropy(f(x + reach * (x_adv - x)), helper(x_adv))``.

    Adversarial training moves the decision boundary further away than the threat asks, along the directions of its
    initial perturbations, and pays with clean accuracy. Helper examples lie further out in the same direction, where
    the class may well be another: that which a plainly trained model sees in the adversarial example.

    The helper has the weights of ``checkpoint``, or else of a copy of the module that learns from the run's own train
    loader first, without this callback. Either is run through the user's own step, in eval mode. A helper that was
    trained here is kept in the run's checkpoints.

    Args:
        attack: see ``AdversarialTraining``; it needs a random start.
        threat: see ``AdversarialTraining``.
        beta: weight of the divergence (see ``TRADES``), >= 0.
        gamma: weight of the helper examples, >= 0.
        reach: how far they lie, in perturbations, > 1; they may leave ball and box.
        checkpoint: weights of a plainly trained model of the same module; None: one is trained first.
        epochs: how long, where one is trained first, >= 1; as long as this model would need.
        inputs: see ``AdversarialTraining``.
        labels: see ``AdversarialTraining``.
        logits: see ``AdversarialTraining``.
        mode: see ``AdversarialTraining``.
        warmup_epochs: see ``AdversarialTraining``.
        warmup: see ``AdversarialTraining``.
        seed: see ``AdversarialTraining``; of the helper's training, too.

    Raises:
        ValueError: a setting is out of range; see ``AdversarialTraining``. When training starts: the checkpoint does
            not fit, or the module cannot be copied.

    Guarantees:
        With ``gamma = 0`` training is bit-identical to ``AdversarialTraining`` with ``TRADES(beta)``.

    Reference:
        Rade & Moosavi-Dezfooli, "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off",
        2022, section 4; the defaults are those of the authors' code.
    """

    def __init__(
        self,
        attack: Attack,
        threat: Threat,
        beta: float = 2.5,
        gamma: float = 0.5,
        reach: float = 3.5,
        checkpoint: str | None = None,
        epochs: int = 10,
        inputs: str | int | None = None,
        labels: str | int | None = None,
        logits: str | None = None,
        mode: str = "eval",
        warmup_epochs: int = 0,
        warmup: str = "eps",
        seed: int | None = None,
    ) -> None:
        for name, value, least in (("beta", beta, 0), ("gamma", gamma, 0), ("reach", reach, 1)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value < float("inf") or (name == "reach" and value == 1):
                sign = ">" if name == "reach" else ">="
                raise ValueError(f"helper_training.{name} must be {sign} {least} and finite, got {value!r}")
        check_texts("helper_training", checkpoint=checkpoint)
        check_counts("helper_training", 1, epochs=epochs)
        super().__init__(
            attack,
            threat,
            TRADES(beta=beta),
            inputs=inputs,
            labels=labels,
            logits=logits,
            mode=mode,
            warmup_epochs=warmup_epochs,
            warmup=warmup,
            seed=seed,
        )
        self.beta, self.gamma, self.reach, self.checkpoint, self.epochs = beta, gamma, reach, checkpoint, epochs
        self._helper: dict[str, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        own = {name: plain(getattr(self, name)) for name in ("beta", "gamma", "reach", "checkpoint", "epochs")}
        return {**{k: v for k, v in super().settings().items() if k not in ("layer", "objective")}, **own}

    def state(self) -> dict[str, Any]:
        trained_here = {"helper": self._helper} if self._helper is not None and self.checkpoint is None else {}
        return {**super().state(), **trained_here}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._helper = state_dict.get("helper")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._helper = None
            if self.checkpoint is None and self.gamma:
                why = "the helper would learn from the same data without privacy. Give a checkpoint of public data"
                refuse_beside(trainer, "DPSGD", "HelperTraining", why)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.gamma:
            return
        if self.checkpoint is not None:
            self._helper = loaded_weights(pl_module, self.checkpoint, "helper_training.checkpoint")
        elif self._helper is None:
            epochs = 1 if trainer.fast_dev_run else self.epochs  # type: ignore[attr-defined]
            self._helper = learned_weights(trainer, pl_module, epochs, (self._run.seed or 0) % 2**32)
        self._helper = {name: t.to(pl_module.device) for name, t in self._helper.items()}

    def part(self, victim: StepVictim, crafted: Crafted, logits: Tensor | None) -> Tensor | None:
        part = super().part(victim, crafted, logits)
        if not self.gamma or self._helper is None or crafted.victim is None:
            return part
        with torch.no_grad(), as_helper(victim.network(), self._helper):
            labels = helper_labels(crafted.victim.logits(crafted.x_adv))
        far = crafted.x + self.reach * (crafted.x_adv - crafted.x)
        loss = self.gamma * classification_loss(victim.logits(far), labels).mean()
        return loss if part is None else part + loss
