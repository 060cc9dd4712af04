"""Models that draw at random, judged by the mean over several draws."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.eot import EOT
from robust_train.evasion.randomness import preserved_rng
from robust_train.evasion.victim import Victim
from robust_train.evasion.wrapped import WrappedVictim


class ManyDraws(WrappedVictim):
    """A victim whose score is the mean over several random passes; all else is the inner one's.

    Args:
        inner: the victim within.
        draws: passes a score, >= 1.
        seed: that the draws follow from, so that a score can be repeated.

    Guarantees:
        The global random state is as before a score.
    """

    def __init__(self, inner: Victim, draws: int, seed: int = 0) -> None:
        super().__init__(inner)
        self.draws, self.seed = draws, seed

    def score(self, x: Tensor) -> Tensor:
        scores = []
        with preserved_rng(x.device), self.inner.undisturbed():
            for draw in range(self.draws):
                with self.inner.reseeded(1009 * self.seed + draw):
                    scores.append(self.inner.score(x))
        return torch.stack(scores).mean(0)


def in_draws(victim: Victim, attacks: Mapping[str, Attack], draws: int) -> tuple[Victim, Mapping[str, Attack]]:
    """Victim and attacks for a model that draws at random: scores are means, and attacks see the mean of the draws.

    Args:
        victim: the model under attack.
        attacks: by name; those that are EOT already stay as they are.
        draws: passes a score, and samples of EOT; 1 changes nothing.
    """
    if draws == 1:
        return victim, attacks
    averaged = {name: a if isinstance(a, EOT) else EOT(a, samples=draws) for name, a in attacks.items()}
    return ManyDraws(victim, draws), averaged
