"""Transfer: examples crafted on a model of the attacker's own, tried on another."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.threat import NORMS, Threat
from robust_train.evasion.victim import ClassifierVictim, Victim


def transfer(
    surrogate: nn.Module, labels: Tensor, x: Tensor, threat: Threat, *, attack: Attack, generator: torch.Generator
) -> Tensor:
    """Run an attack on a surrogate in eval mode; the model that the examples are meant for is never asked.

    Args:
        surrogate: ``x -> logits (B, classes)``; left as it was found. Where it lives on another device than ``x`` or is
            of another dtype, a copy or the inputs are converted.
        labels: of the clean inputs ``(B,)``.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        attack: what crafts the examples.
        generator: source of all randomness.

    Returns:
        Adversarial inputs ``(B, ...)``, in the surrogate's dtype.
    """
    kind = next((p for p in surrogate.parameters()), x)
    if kind.device != x.device:
        surrogate = copy.deepcopy(surrogate).to(x.device)
    victim = ClassifierVictim(surrogate, labels)
    with victim.undisturbed():
        surrogate.eval()
        return attack(victim, x.to(kind.dtype), threat, generator)


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict, or a Lightning checkpoint's, into a module: tensors only, never pickled code.

    Args:
        module: takes the weights.
        path: written by ``torch.save(module.state_dict())`` or by a Trainer. Where ``module`` is a part of the module
            that was saved (the network in a LightningModule), the prefix of its names is found.

    Raises:
        ValueError: the file does not hold this module's weights.
    """
    saved = torch.load(Path(path), map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved) if isinstance(saved, Mapping) else {}
    wanted = module.state_dict()
    last = next(iter(wanted), "")
    prefixes = [key.removesuffix(last) for key in saved if key == last or key.endswith(f".{last}")]
    for prefix in prefixes:
        part = {key: saved[prefix + key] for key in wanted if prefix + key in saved}
        if all(key in part and part[key].shape == value.shape for key, value in wanted.items()):
            module.load_state_dict(part)
            return
    raise ValueError(f"{path} does not hold the weights of a {type(module).__name__} of these settings")


@dataclass(frozen=True)
class Transfer(Attack):
    """Black-box attack without queries: any attack, run on a surrogate instead of the model under attack.

    It measures what an attacker finds who has trained a model of their own. Where it finds more than the same attack on
    the model itself, the model hides its gradients.

    Args:
        surrogate: another model for the same inputs and classes, ``x -> logits``; judged in eval mode.
        attack: what crafts the examples, for example MIFGSM.
        weights: file with the surrogate's weights (see ``load_weights``), or None: those it has.

    Raises:
        TypeError: ``surrogate`` is no torch module, or ``attack`` no attack.
        ValueError: the file does not hold the surrogate's weights.

    Guarantees:
        The model under attack is never called.

    Reference:
        Papernot et al., "Transferability in Machine Learning: from Phenomena to Black-Box Attacks using Adversarial
        Samples", 2016, section 3.
    """

    family: ClassVar[str] = "blackbox"

    surrogate: nn.Module = field(repr=False)
    attack: Attack
    weights: str | None = None

    def __post_init__(self) -> None:
        surrogate: Any = self.surrogate
        if not isinstance(surrogate, nn.Module):
            raise TypeError(f"transfer.surrogate must be a torch module, got {surrogate!r}")
        if not isinstance(self.attack, Attack):
            raise TypeError(f"transfer.attack must be an attack, got {self.attack!r}")
        if self.weights is not None:
            surrogate = copy.deepcopy(surrogate)
            load_weights(surrogate, self.weights)
            object.__setattr__(self, "surrogate", surrogate)

    works_in: ClassVar[tuple[str, ...]] = NORMS  # the attack within says which

    @property
    def limits(self) -> str | None:
        return self.attack.limits

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "labels"})  # of logits only that there are some: with them labels are found

    @property
    def reach(self) -> float:
        return self.attack.reach

    @property
    def passes(self) -> float:
        return self.attack.passes

    def check(self, threat: Threat) -> None:
        self.attack.check(threat)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return transfer(self.surrogate, victim.known_labels(), x, threat, attack=self.attack, generator=generator)
