"""Adversarial weight perturbation: the loss is taken where the weights, too, were moved for the worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robust_train.evasion.objectives.base import Objective
from robust_train.evasion.objectives.pgd_at import PGDAT
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim
from robust_train.evasion.weights import exchanged

DELEGATED = ("needs", "replaces_loss", "trains_on", "uses_logits")


def weight_perturbations(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """``gamma * ||w|| * g / ||g||`` of each weight tensor, in its dtype.

    Args:
        weights: tensors of any shapes.
        gradients: of the loss to be increased, of the same shapes; entries that are not finite count as 0.
        gamma: size of a perturbation relative to its weights, >= 0.

    Returns:
        One tensor a weight; zeros where the gradient is zero.
    """
    found = []
    for w, g in zip(weights, gradients, strict=True):
        g = torch.nan_to_num(g.detach().float(), posinf=0.0, neginf=0.0)
        g = g / g.abs().max().clamp_min(torch.finfo(g.dtype).tiny)  # squares of small gradients would underflow
        norm = torch.linalg.vector_norm(g)
        size = gamma * torch.linalg.vector_norm(w.detach().float()) / norm.clamp_min(torch.finfo(g.dtype).tiny)
        found.append((size * g).to(w.dtype))
    return found


@dataclass(frozen=True)
class AWP(Objective):
    """Another objective, its loss taken at ``w + v``: ``v`` increases that loss, ``||v|| = gamma * ||w||`` by layer.

    Flattens the loss in the weights too, against robust overfitting. One gradient of the loss in the weights gives
    ``v``; then the user's own step runs with the weights ``w + v``, and its gradient is applied to ``w``. Perturbed are
    the trainable parameters with at least two dimensions, as in the authors' code: no biases, no normalisation layers.
    In manual optimization the first loss that is handed to ``manual_backward`` is taken at ``w + v``; in a distributed
    run ``v`` follows from the batches of all ranks.

    Args:
        objective: the objective that is perturbed; None: ``PGDAT()``.
        gamma: size of the perturbation relative to the weights, in [0, 1). The paper has 0.01 for adversarial training
            and 0.005 for TRADES.

    Raises:
        ValueError: ``gamma`` is out of range; with the first batch: the weights are sharded, or the step writes into
            them.
        TypeError: ``objective`` is none.

    Note:
        A step that writes into its own weights (clips them, say) would write into the perturbed ones: it is refused,
        unless it writes past autograd, through ``.data``, where nobody can see it.

    Guarantees:
        With ``gamma = 0`` training is bit-identical to training with ``objective`` alone. The weights are never written
        to, so that nothing has to be restored.

    Reference:
        Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", 2020, section 4.2.
    """

    objective: Objective = field(default_factory=PGDAT)
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective) or isinstance(self.objective, AWP):
            raise TypeError(f"awp.objective must be another robust_train Objective, got {self.objective!r}")
        number = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool)
        if not number or not 0 <= self.gamma < 1:
            raise ValueError(f"awp.gamma must be in [0, 1), got {self.gamma!r}")
        for name in DELEGATED:
            object.__setattr__(self, name, getattr(self.objective, name))

    @property
    def own_weight(self) -> float:
        return self.objective.own_weight

    def weight_of_own(self, victim: Victim) -> float:
        return self.objective.weight_of_own(victim)

    @property
    def extra_passes(self) -> float:
        passes = self.objective.extra_passes
        return passes + (1.0 + passes if self.gamma else 0.0)

    def attacked(self, victim: Victim, x: Tensor) -> Victim:
        return self.objective.attacked(victim, x)

    def part(self, victim: Victim, x: Tensor, x_adv: Tensor, logits: Tensor | None) -> Tensor | None:
        return self.objective.part(victim, x, x_adv, logits)

    def penalty(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor | None:
        return self.objective.penalty(victim, x, threat, generator)

    def weights(self, victim: Victim, x: Tensor, x_adv: Tensor) -> AbstractContextManager[None]:
        if not self.gamma:
            return nullcontext()
        network = victim.network()
        weights = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
        if any(hasattr(p, "to_local") for p in weights):
            raise ValueError(
                "AWP: each process holds only a part of every weight, and their norms would be those of the parts: "
                "train with strategy=ddp, or without AWP"
            )
        if not weights:
            return nullcontext()
        gradients = self._gradients(victim, x, x_adv, weights)
        moves = weight_perturbations(weights, gradients, self.gamma)
        return _read_only(network, {w: w + v for w, v in zip(weights, moves, strict=True)})

    def _gradients(self, victim: Victim, x: Tensor, x_adv: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
        """Of the objective's loss, averaged over all processes."""
        trained = x_adv if self.objective.trains_on == "adversarial" else x
        with torch.enable_grad():
            if self.objective.uses_logits:
                own, logits = victim.loss_and_logits(trained)
            else:
                own, logits = victim.loss(trained), None
            loss = self.weight_of_own(victim) * own.mean()
            part = self.part(victim, x, x_adv, logits)
            loss = (loss if part is None else loss + part).float() * victim.gradient_scale
            try:
                found = torch.autograd.grad(loss, weights, allow_unused=True)
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                raise ValueError(_WRITES) from error
        gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for g in gradients:
                torch.distributed.all_reduce(g)  # the sum: only its direction counts
        return gradients


@contextmanager
def _read_only(network: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """``exchanged``, and a refusal where the other tensors are written to."""
    versions = [t._version for t in tensors.values()]
    with exchanged(network, tensors):
        yield
    if [t._version for t in tensors.values()] != versions:
        raise ValueError(_WRITES)


_WRITES = (
    "AWP: the training step writes into its own weights, and what it wrote into the perturbed ones would be lost: move "
    "that into on_train_batch_start or on_before_zero_grad, or train without AWP"
)
