"""What every training objective has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim


class Objective(ABC):
    """What a model is trained on, given clean inputs ``x`` and adversarial inputs ``x_adv``.

    The loss that is backpropagated is ``own_weight * own + part``, where ``own`` is the user's own training loss on
    the inputs that ``trains_on`` names, and ``part`` is the objective's part.

    Attributes:
        needs: what the victim must provide.
        replaces_loss: ``attacked`` has a loss of the objective's own, without gradient at ``x`` itself; attacks that
            read logits and labels instead of the loss would miss it.
        trains_on: ``"adversarial"`` or ``"clean"``: which inputs the user's own step is given.
        own_weight: factor on the user's own loss.
        uses_logits: ``part`` reads the logits of the user's own forward pass.
        extra_passes: training passes on top of the user's own, for the printed estimate of cost.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    replaces_loss: ClassVar[bool] = False
    trains_on: ClassVar[str] = "adversarial"
    uses_logits: ClassVar[bool] = False

    @property
    def own_weight(self) -> float:
        return 1.0

    def weight_of_own(self, victim: Victim) -> float:
        """Factor on the user's own loss for one batch; by default ``own_weight``."""
        return self.own_weight

    @property
    def extra_passes(self) -> float:
        return 0.0

    def attacked(self, victim: Victim, x: Tensor) -> Victim:
        """What the attack shall maximise; by default the user's own loss."""
        return victim

    @abstractmethod
    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        """The objective's own part of the loss, a scalar with gradients, or None.

        Args:
            victim: the model in training mode; its losses and logits carry gradients to the parameters.
            x: clean inputs ``(B, ...)``.
            x_adv: adversarial inputs, same shape.
            logits: what the user's own forward pass returned, with gradients, where ``uses_logits``.
        """

    def penalty(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor | None:
        """A further part of the loss that looks at points of its own in the threat's ball; by default None.

        Args:
            victim: as for ``part``.
            x: clean inputs ``(B, ...)``.
            threat: what the attack of this batch was held to.
            generator: source of all randomness.
        """
        return None

    def weights(self, victim: Victim, x: Tensor, x_adv: Tensor) -> AbstractContextManager[None]:
        """Inside, the model has the weights at which the loss is taken; by default its own."""
        return nullcontext()
