"""What every attack has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
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
        works_in: which norms of the threat it can do.

    Guarantees:
        The result lies in the threat's box and, unless the attack has ``limits`` of its own, in its ball (times
        ``reach``), in float32, float64 and bfloat16; ``eps = 0`` returns ``x`` bit for bit; the same generator state
        gives the same result; inputs, labels, parameters, ``.grad``, buffers, modes and the global random state are as
        before, also after an exception; no parameter gradient is computed, unless the victim asks for it (``harvest``).
    """

    family: ClassVar[str] = "gradient"
    works_in: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    @property
    def limits(self) -> str | None:
        """What the attack keeps to instead of the threat's ball, in words (``"rotation up to 30°"``); None: the ball.

        The box (``low``, ``high``, features that cannot change) holds for every attack.
        """
        return None

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
        _check_norm(self, threat)

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
        _check_norm(self, threat)
        self.check(threat)
        generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
        x = x.detach()
        with preserved_rng(x.device), victim.undisturbed():
            x_adv = self.perturb(victim, x, threat, generator)
        if self.limits is not None:
            return threat.enclose_in_box(x_adv, x) if threat.radius > 0 else x.clone()
        return threat.scaled(self.reach).enclose(x_adv, x)

    @abstractmethod
    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        """The method itself; what it returns is projected by the caller."""


def _check_norm(attack: Attack, threat: Threat) -> None:
    if attack.limits is None and threat.norm not in attack.works_in:
        cure = "use SparseRS" if threat.norm == "l0" else f"use PGD, or threat.norm={attack.works_in[0]}"
        raise ValueError(f"{type(attack).__name__} has no version for threat.norm={threat.norm}: {cure}")


def what_holds(attacks: Iterable[Attack], threat: Threat, layer: str | None = None) -> str:
    """The threat in words, and what attacks with limits of their own keep to instead.

    Args:
        attacks: that run.
        threat: what the others keep to.
        layer: the submodule whose output is perturbed; None: the input is.

    Returns:
        For example ``Linf ball of radius 0.1 in [0, 1]; Spatial instead: rotation up to 30°, translation up to 3 px``.
    """
    others = [f"; {type(a).__name__} instead: {a.limits}" for a in attacks if a.limits is not None]
    place = "" if layer is None else f", around the output of {layer}"
    return threat.describe() + place + "".join(dict.fromkeys(others))


def working_precision(x: Tensor) -> Tensor:
    """``x`` in float32 where its own dtype is too coarse to add up small steps."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
