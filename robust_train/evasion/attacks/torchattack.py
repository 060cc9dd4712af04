"""Any attack of the torchattacks library, by name: the independent judge of our own attacks."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim

L2_ONLY = ("PGDL2", "PGDRSL2")  # of the classes that take a radius and no norm; the others of those are Linf attacks
RADIUS = ("eps", "max_epsilon")  # what the classes call it
THREE_CHANNELS = ("PIFGSM", "PIFGSMPP", "TIFGSM")  # kernels with groups=3
WRAPPERS = {"LGV": "needs a training loader of its own", "MultiAttack": "takes attacks; use WorstCase"}


def _range(threat: Threat) -> tuple[float, float]:
    """Smallest and largest input, the same for all features.

    Raises:
        ValueError: they differ between features, or are not finite.
    """
    low, high = threat.low, threat.high
    if isinstance(low, tuple) or isinstance(high, tuple) or threat.mutable is not None:
        raise ValueError("torchattacks knows one range for all features and no mutable mask: use PGD for this threat")
    if not math.isfinite(high - low):
        raise ValueError("torchattacks needs bounded inputs: give finite threat.low and threat.high")
    return low, high


def _check_like(key: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than torchattacks' own default, which torchattacks itself does not look at.

    Raises:
        ValueError: it is.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        least = 1 if key in ("steps", "n_restarts") else 0
        fits, wanted = isinstance(value, int) and number and least <= value < 2**63, f"a whole number >= {least}"
    elif isinstance(default, float):
        fits, wanted = number, "a finite number"
    else:
        fits, wanted = not isinstance(default, str) or isinstance(value, str), "a text"
    if not fits:
        raise ValueError(f"torchattack.settings.{key} must be {wanted}, got {value!r}")


class _UnitModel(nn.Module):
    """The victim as torchattacks expects a model: pixels in [0, 1] to logits (B, classes)."""

    def __init__(self, victim: Victim, x: Tensor, threat: Threat) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(torch.zeros((), device=x.device), requires_grad=False)
        self._shape, self._dtype = x.shape[1:], x.dtype
        self._victim, self._threat = victim, threat

    def forward(self, unit: Tensor) -> Tensor:
        low, high = _range(self._threat)
        pixels = unit.reshape(-1, *self._shape) * (high - low) + low
        logits = self._victim.logits(self._threat.from_pixels(pixels).to(self._dtype)).float()
        if logits.numel() == logits.shape[0]:  # one score: class 1 against class 0
            return torch.stack([torch.zeros_like(logits.flatten()), logits.flatten()], 1)
        return logits


@dataclass(frozen=True)
class TorchAttack(Attack):
    """An attack of torchattacks, run on any victim that has logits and labels.

    The threat supplies ``eps`` and the norm; where the class takes ``alpha`` and you give none it is
    ``2.5 * eps / steps`` (torchattacks' fixed 2/255 would be far too small or too large elsewhere). The result is
    projected onto ball and box, so attacks without a radius (CW, DeepFool, …) are judged within the threat like all
    others. torchattacks' class ``AutoAttack`` runs 10 iterations where the standard has 100: it is not the standard
    AutoAttack.

    Args:
        name: the class's name in torchattacks, for example ``"APGD"``.
        settings: its other constructor arguments, for example ``{"steps": 50}``; lengths such as ``alpha`` in units of
            the range ``high - low``, because torchattacks works on [0, 1].

    Raises:
        ImportError: torchattacks is not installed; the message says how to install it.
        ValueError: no such attack, an argument that it does not take, or one that cannot run on this threat.

    Reference:
        Kim, "Torchattacks: A PyTorch Repository for Adversarial Attacks", 2020.
    """

    family: ClassVar[str] = "external"

    name: str = "APGD"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.settings, Mapping):
            raise TypeError(f"torchattack.settings must be arguments by name, got {self.settings!r}")
        object.__setattr__(self, "settings", dict(self.settings))
        accepted = inspect.signature(self._attack_class().__init__).parameters
        for key in self.settings:
            if key not in accepted or key in ("self", "model"):
                known = ", ".join(k for k in accepted if k not in ("self", "model"))
                raise ValueError(f"torchattacks.{self.name} has no argument {key!r}; it has: {known}")
            _check_like(key, self.settings[key], accepted[key].default)
        for key in (*RADIUS, "norm"):
            if key in self.settings:
                raise ValueError(
                    f"{key} belongs to the threat (threat.eps, threat.norm), not to torchattacks.{self.name}"
                )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "labels"})

    @property
    def passes(self) -> float:
        arguments = inspect.signature(self._attack_class().__init__).parameters
        steps = self.settings.get("steps", arguments["steps"].default if "steps" in arguments else 1)
        return float(steps) * float(self.settings.get("n_restarts", 1))

    def check(self, threat: Threat) -> None:
        super().check(threat)
        _range(threat)
        accepted = inspect.signature(self._attack_class().__init__).parameters
        if "norm" in accepted and threat.norm == "l1":
            raise ValueError(f"torchattacks.{self.name} has no L1 version, and threat.norm is l1: use EADL1, or PGD")
        own = "l2" if self.name in L2_ONLY else "linf"
        if "norm" not in accepted and any(key in accepted for key in RADIUS) and threat.norm != own:
            raise ValueError(f"torchattacks.{self.name} is an attack of norm {own}, but threat.norm is {threat.norm}")

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        torch.manual_seed(seed)  # torchattacks draws from the global generators; the caller puts them back
        if threat.radius == 0:
            return x
        with torch.no_grad():
            logits = victim.logits(x)
        binary = logits.numel() == len(x)
        arguments = self._arguments(x, threat, seed, classes=2 if binary else logits.shape[1])
        low, high = _range(threat)
        unit = ((threat.to_pixels(x.float()) - low) / (high - low)).clamp(0.0, 1.0)
        images = unit if x.ndim == 4 else unit.reshape(len(x), -1, 1, 1)
        labels = victim.known_labels()
        soft = labels.is_floating_point() and not binary
        labels = labels.argmax(1) if soft else (labels.flatten() if binary else labels).long()
        with torch.enable_grad():
            attack = self._attack_class()(_UnitModel(victim, x, threat), **arguments)
            found = attack(images.clone(), labels.clone()).detach().view_as(unit)
        moved = (found - unit) * (high - low)
        return x.float() + moved / threat.scale(x.float())

    def _attack_class(self) -> type:
        try:
            library = importlib.import_module("torchattacks")
        except ImportError as error:
            raise ImportError(
                "torchattacks is not installed: pip install 'robust-train[torchattacks]'. If its pin of requests "
                "clashes or torchvision cannot be had: pip install --no-deps torchattacks (its code imports neither)."
            ) from error
        if not isinstance(self.name, str):
            raise TypeError(f"torchattack.name must be the name of a class of torchattacks, got {self.name!r}")
        if self.name in WRAPPERS:
            raise ValueError(f"torchattacks.{self.name} {WRAPPERS[self.name]}: it cannot be run by name")
        if self.name not in library.__all__:
            near = difflib.get_close_matches(self.name, library.__all__, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"torchattack.name: torchattacks has no attack {self.name!r}{hint}")
        return getattr(library, self.name)

    def _arguments(self, x: Tensor, threat: Threat, seed: int, classes: int) -> dict[str, Any]:
        """Constructor arguments, in the units of [0, 1]."""
        if self.name in THREE_CHANNELS and (x.ndim != 4 or x.shape[1] != 3):
            raise ValueError(f"torchattacks.{self.name} works on 3-channel images only, got {tuple(x.shape)}")
        accepted = inspect.signature(self._attack_class().__init__).parameters
        arguments: dict[str, Any] = {}
        if "norm" in accepted:
            arguments["norm"] = {"linf": "Linf", "l2": "L2"}[threat.norm]
        low, high = _range(threat)
        for key in RADIUS:
            if key in accepted:
                arguments[key] = threat.radius / (high - low)
        if "eps" in accepted and "alpha" in accepted:
            steps = self.settings.get("steps", accepted["steps"].default if "steps" in accepted else 2)
            arguments["alpha"] = 2.5 * arguments["eps"] / steps
        if "n_classes" in accepted:
            arguments["n_classes"] = classes
        if "seed" in accepted:
            arguments["seed"] = seed
        return {**arguments, **self.settings}
