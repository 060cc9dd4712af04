"""Several attacks as one: of each example the worst that any of them found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.threat import NORMS, Threat
from robust_train.evasion.victim import Victim


def worst_case(
    victim: Victim, x: Tensor, threat: Threat, *, attacks: Sequence[Attack], generator: torch.Generator
) -> Tensor:
    """Run attacks one after the other and keep what hurts most.

    Args:
        victim: the model under attack.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        attacks: at least one; an example that is fooled is spared the next where ``victim.stop_when_fooled``.
        generator: source of all randomness.

    Returns:
        Of each example the candidate with the highest loss, or the first that is misclassified; of the whole batch
        where the victim knows only its mean loss. ``(B, ...)``.
    """
    best, best_loss = x.clone(), None
    alive = torch.arange(len(x), device=x.device)
    for attack in attacks:
        part = victim if len(alive) == len(x) else victim.take(alive)
        here = attack(part, x[alive], threat, generator)
        with torch.no_grad():
            if victim.stop_when_fooled:
                best[alive] = here
                alive = alive[part.score(here) > 0]
                if len(alive) == 0:
                    break
                continue
            loss = victim.loss(here)
        better = torch.ones_like(loss, dtype=torch.bool) if best_loss is None else loss > best_loss
        best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), here, best)
        best_loss = loss if best_loss is None else torch.maximum(loss, best_loss)
    return best


@dataclass(frozen=True)
class WorstCase(Attack):
    """The strongest of several attacks, example by example.

    Args:
        attacks: a list of attacks, or names with attacks.

    Raises:
        ValueError: there is none.
        TypeError: one of them is not an attack.
    """

    family: ClassVar[str] = "ensemble"

    attacks: Sequence[Attack] | Mapping[str, Attack]

    def __post_init__(self) -> None:
        if not isinstance(self.attacks, (Sequence, Mapping)) or isinstance(self.attacks, str):
            raise TypeError(f"worst_case.attacks must be attacks by name, or a list of them, got {self.attacks!r}")
        members: Any = self.attacks.values() if isinstance(self.attacks, Mapping) else self.attacks
        object.__setattr__(self, "attacks", tuple(members))
        if not self.members:
            raise ValueError("worst_case.attacks must hold at least one attack")
        for attack in self.members:
            if not isinstance(attack, Attack):
                raise TypeError(f"worst_case.attacks must hold attacks, got {attack!r}")

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks in the order in which they run."""
        return tuple(self.attacks)  # type: ignore[arg-type]

    works_in: ClassVar[tuple[str, ...]] = NORMS  # its members say which

    @property
    def limits(self) -> str | None:
        own = [attack.limits for attack in self.members if attack.limits is not None]
        rest = ["or the ball"] if own and len(own) < len(self.members) else []
        return "; ".join([*own, *rest]) or None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(attack.needs for attack in self.members))

    @property
    def reach(self) -> float:
        return max(attack.reach for attack in self.members)

    @property
    def passes(self) -> float:
        return sum(attack.passes for attack in self.members)

    @property
    def starts_at_clean_input(self) -> bool:
        return all(attack.starts_at_clean_input for attack in self.members)

    def check(self, threat: Threat) -> None:
        for attack in self.members:
            attack.check(threat)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return worst_case(victim, x, threat, attacks=self.members, generator=generator)
