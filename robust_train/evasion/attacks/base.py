"""What every attack has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.randomness import preserved_rng
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim


class Attack(ABC):
    """Settings of an attack; calling it perturbs a batch.

    To add one, write a file with a pure function and a frozen dataclass that implements ``perturb``, and a yaml of the
    same name in ``conf/attack/``; the contract tests find it there.

    Attributes:
        family: which contract tests apply: ``"gradient"``, ``"minimum_norm"`` (seeks the nearest misclassified point),
            ``"blackbox"`` (asks for scores only), ``"noise"``, ``"ensemble"``, ``"external"`` or one of your own.

    Guarantees:
        The result lies in the threat's ball (times ``reach``) and box, in float32, float64 and bfloat16; ``eps = 0``
        returns ``x`` bit for bit; the same generator state gives the same result; inputs, labels, parameters,
        ``.grad``, buffers, modes and the global random state are as before, also after an exception; no parameter
        gradient is computed.
    """

    family: ClassVar[str] = "gradient"

    @property
    def needs(self) -> frozenset[str]:
        """What the victim must provide: of ``"loss"``, ``"per_example_loss"``, ``"logits"`` and ``"labels"``."""
        return frozenset({"loss"})

    @property
    def reach(self) -> float:
        """Largest perturbation, as a multiple of ``threat.eps``. More than 1 only in attacks made for training."""
        return 1.0

    @property
    def passes(self) -> float:
        """How many forward-backward passes to the input one call costs."""
        return 1.0

    @property
    def starts_at_clean_input(self) -> bool:
        """Whether the first gradient is taken at ``x`` itself, where some losses have none."""
        return False

    def check(self, threat: Threat) -> None:
        """Refuse a threat that this attack cannot work within.

        Raises:
            ValueError: the message says why.
        """
        return

    def __call__(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator | None = None) -> Tensor:
        """Perturb a batch.

        Args:
            victim: the model under attack.
            x: clean model inputs ``(B, ...)``, floating point.
            threat: what the attacker may do.
            generator: the only source of randomness. None: a fresh one with seed 0, so that a call can be repeated.

        Returns:
            Adversarial inputs of ``x``'s shape and dtype, detached.

        Raises:
            ValueError: the victim does not provide what the attack needs.
        """
        if missing := sorted(self.needs - victim.provides):
            raise ValueError(f"{type(self).__name__} needs {' and '.join(missing)}, which this model does not provide")
        self.check(threat)
        generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
        x = x.detach()
        with preserved_rng(x.device), victim.undisturbed():
            x_adv = self.perturb(victim, x, threat, generator)
        return threat.scaled(self.reach).enclose(x_adv, x)

    @abstractmethod
    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        """The method itself; what it returns is projected by the caller."""


def working_precision(x: Tensor) -> Tensor:
    """``x`` in float32 where its own dtype is too coarse to add up small steps."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
