"""FreeLB: every step of the attack trains the model too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_train.evasion.gradients import Harvest
from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.victim import Victim


def with_gradients(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """``value``, a scalar, with ``gradients`` as its gradients in ``parameters``; None where there is none."""
    return _Given.apply(value, list(gradients), *parameters)  # type: ignore[return-value]


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(None if g is None else g * upstream.to(g.dtype) for g in ctx.gradients)


@dataclass(frozen=True)
class FreeLB(Objective):
    """The mean of the user's own loss over all points that the attack visits.

    An attack of ``k`` gradient steps visits ``k + 1`` points of the ball: those where it takes gradients, and where it
    ends. At each the gradient in the parameters is taken in the same backward pass as the one in the input, so that the
    ``k + 1`` points cost ``k + 1`` passes of standard training. The paper's K is ``k + 1``.

    Made for embeddings (``AdversarialTraining(layer="embedding")``), and right for any input. The steps see the model
    as it is trained, with one dropout mask for all of them, as the paper asks: give the callback ``mode="train"``.

    Guarantees:
        The gradient is the mean of the gradients of the own loss at those points, up to float rounding; with
        ``eps = 0`` it is the user's own.

    Note:
        For attacks that differentiate the step's own loss: PGD without restarts, FGSM. An optimizer that calls its
        closure again for one batch (LBFGS) is given the gradients of the first call at the points within.

    Reference:
        Zhu et al., "FreeLB: Enhanced Adversarial Training for Natural Language Understanding", 2020, algorithm 1 and
        section 3.3.
    """

    def attacked(self, victim: Victim, x: Tensor) -> Victim:
        parameters = [p for p in victim.network().parameters() if p.requires_grad]
        if any(hasattr(p, "to_local") for p in parameters):
            raise ValueError("FreeLB cannot pick up gradients of sharded parameters (fully_shard): use strategy=ddp")
        victim.harvest = Harvest(parameters)
        return victim.training()

    def weight_of_own(self, victim: Victim) -> float:
        return 1.0 / (1 + self._harvest(victim).count)

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        harvest, share = self._harvest(victim), self.weight_of_own(victim)
        gradients = [None if g is None else g * share for g in harvest.gradients]
        return with_gradients(harvest.loss * share, harvest.parameters, gradients)

    def _harvest(self, victim: Victim) -> Harvest:
        if victim.harvest is None or not victim.harvest.count:
            raise ValueError(
                "FreeLB trains on the points where the attack differentiates the training step's own loss, and this "
                "attack differentiates something else: use PGD or FGSM, untargeted"
            )
        return victim.harvest
