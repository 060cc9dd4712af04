"""Expectation over transformation: any attack against a model that draws at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.threat import NORMS, Threat
from robust_train.evasion.victim import Victim
from robust_train.evasion.wrapped import WrappedVictim


def eot(
    victim: Victim, x: Tensor, threat: Threat, *, attack: Attack, samples: int, generator: torch.Generator
) -> Tensor:
    """Run an attack on the mean loss and the mean logits of several random passes.

    Args:
        victim: the model under attack, which draws from the global generators of torch, numpy or Python.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        attack: the attack within.
        samples: random passes for each that the attack within asks for, >= 1.
        generator: source of all randomness: the attack's own, and the seeds of the model's.

    Returns:
        What the attack within found, ``(B, ...)``.
    """
    return attack(_MeanVictim(victim, samples, generator), x, threat, generator)


@dataclass(frozen=True)
class EOT(Attack):
    """Any attack, on the average over what a randomised model draws.

    A model that adds noise, drops features or resizes at random shows a single pass a gradient that holds for that draw
    only. Here each gradient is the mean over ``samples`` draws, each new. Examples that a draw misclassifies stay in
    the attack until its last step, because another draw may classify them right.

    Args:
        attack: the attack within.
        samples: random passes for each that the attack within asks for, >= 1. Their graphs are held in memory together.

    Raises:
        TypeError: ``attack`` is not an attack.
        ValueError: ``samples`` is not a whole number >= 1.

    Guarantees:
        Against a model that draws nothing it finds what the attack within finds.

    Note:
        Layers that draw from a ``torch.Generator`` of their own are averaged over whatever that draws next.

    Reference:
        Athalye et al., "Synthesizing Robust Adversarial Examples", 2018, section 2.1; Athalye et al., "Obfuscated
        Gradients Give a False Sense of Security", 2018, section 4.2.
    """

    family: ClassVar[str] = "ensemble"

    attack: Attack
    samples: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(f"eot.attack must be an attack, got {self.attack!r}")
        check_counts("eot", samples=self.samples)

    works_in: ClassVar[tuple[str, ...]] = NORMS  # the attack within says which

    @property
    def limits(self) -> str | None:
        return self.attack.limits

    @property
    def needs(self) -> frozenset[str]:
        return self.attack.needs

    @property
    def reach(self) -> float:
        return self.attack.reach

    @property
    def passes(self) -> float:
        return self.attack.passes * self.samples

    @property
    def starts_at_clean_input(self) -> bool:
        return self.attack.starts_at_clean_input

    def check(self, threat: Threat) -> None:
        self.attack.check(threat)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return eot(victim, x, threat, attack=self.attack, samples=self.samples, generator=generator)


class _MeanVictim(WrappedVictim):
    """Means over random passes; parts of it share one generator."""

    def __init__(self, inner: Victim, samples: int, generator: torch.Generator) -> None:
        super().__init__(inner)
        self.stop_when_fooled = False
        self._samples, self._generator = samples, generator

    def loss(self, x: Tensor) -> Tensor:
        return self._mean(lambda: (self.inner.loss(x),))[0]

    def logits(self, x: Tensor) -> Tensor:
        return self._mean(lambda: (self.inner.logits(x),))[0]

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self._mean(lambda: self.inner.loss_and_logits(x))
        return loss, logits

    def _mean(self, ask: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        device = self._generator.device
        seeds = torch.randint(2**62, (self._samples,), generator=self._generator, device=device).tolist()
        each = []
        for seed in seeds:
            with self.inner.reseeded(seed):
                each.append(ask())
        return tuple(torch.stack(parts).mean(0) for parts in zip(*each, strict=True))
