"""The attack that knows of a reconstruction, and what the reconstruction gains against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.bpda import bpda
from robust_train.evasion.attacks.eot import EOT
from robust_train.evasion.attacks.worst_case import worst_case
from robust_train.evasion.evaluate import judge
from robust_train.evasion.gain import Gain
from robust_train.evasion.reconstruction.base import Reconstruction
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import ClassifierVictim, Victim


@contextmanager
def in_front(module: nn.Module, reconstruct: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what a module is called with is reconstructed first; its weights, keys and code stay as they are.

    Args:
        module: is called with a tensor first.
        reconstruct: keeps the shape.

    Raises:
        ValueError: when the module is called: with something else.
    """

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor):
            got = type(args[0]).__name__ if args else "nothing"
            raise ValueError(
                f"{type(module).__name__} must be called with a tensor first to be reconstructed, got {got}"
            )
        return (reconstruct(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _PastReconstruction(Attack):
    """An attack for which the reconstruction has the identity's gradient."""

    attack: Attack
    reconstruction: Reconstruction

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return bpda(victim, x, threat, attack=self.attack, modules=[self.reconstruction], generator=generator)


@dataclass(frozen=True)
class AdaptiveAttack(Attack):
    """Any attack, made for a model behind a reconstruction: BPDA, EOT where it draws, and plainly; the worst counts.

    Past the reconstruction with the identity's gradient (BPDA), and through its own gradient, which is better where
    there is one. A reconstruction that draws at random is averaged over ``samples`` draws (EOT).

    Args:
        attack: the attack within.
        reconstruction: that stands in front of the model; the same object.
        samples: of EOT, where the reconstruction draws, >= 1.

    Raises:
        TypeError: a part is of another kind.
        ValueError: ``samples`` is out of range.

    Reference:
        Athalye et al., "Obfuscated Gradients Give a False Sense of Security", 2018, sections 4.1 and 4.2; Tramèr et
        al., "On Adaptive Attacks to Adversarial Example Defenses", 2020.
    """

    family: ClassVar[str] = "ensemble"

    attack: Attack
    reconstruction: Reconstruction
    samples: int = 10

    def __post_init__(self) -> None:
        for name, kind in (("attack", Attack), ("reconstruction", Reconstruction)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"adaptive_attack.{name} must be a robust_train {kind.__name__}")
        check_counts("adaptive_attack", samples=self.samples)

    def __str__(self) -> str:
        return f"{self.attack} adapted to {type(self.reconstruction).__name__} (BPDA{', EOT' * self._random})"

    @property
    def needs(self) -> frozenset[str]:
        return self.attack.needs

    @property
    def passes(self) -> float:
        return self.attack.passes * 2 * (self.samples if self._random else 1)

    def check(self, threat: Threat) -> None:
        self.attack.check(threat)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        inner = EOT(self.attack, self.samples) if self._random else self.attack
        attacks = [_PastReconstruction(inner, self.reconstruction), inner]
        return worst_case(victim, x, threat, attacks=attacks, generator=generator)

    @property
    def _random(self) -> bool:
        return bool(self.reconstruction.random) and self.samples > 1


def reconstruction_gain(
    model: nn.Module,
    reconstruction: Reconstruction,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    attack: Attack,
    *,
    samples: int = 10,
    seed: int = 0,
) -> Gain:
    """Measure what a reconstruction in front of a classifier gains, against an attack that knows of it and one not.

    Args:
        model: ``x -> logits (B, classes)``, in eval mode; left as it was found.
        reconstruction: what is put in front of it.
        x: clean inputs ``(B, ...)``.
        y: class indices ``(B,)``.
        threat: what the attacker may do; also says how inputs were normalised.
        attack: the naive attack; the adaptive one is made of it.
        samples: of EOT, see ``AdaptiveAttack``.
        seed: of the attacks.

    Guarantees:
        The adaptive accuracy is the worst case over the naive and the adaptive attack, so never above the apparent one.
    """
    victim = ClassifierVictim(model, y, stop_when_fooled=True)

    def accuracy(attacks: dict[str, Attack]) -> float:
        return float(judge(victim, x, threat, attacks, seed).worst.mean())

    adapted = AdaptiveAttack(attack, reconstruction, samples)
    undefended = accuracy({"naive": attack})
    with in_front(model, lambda inputs: threat.from_pixels(reconstruction(threat.to_pixels(inputs)))):
        apparent = accuracy({"naive": attack})
        adaptive = accuracy({"naive": attack, "adaptive": adapted})
    return Gain(undefended, apparent, adaptive, len(x))
