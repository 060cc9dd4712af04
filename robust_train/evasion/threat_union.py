"""Several threats at once: balls of several norms around the same input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robust_train.evasion.threat import NORMS, Threat, parse_number


@dataclass(frozen=True)
class ThreatUnion(Threat):
    """An attacker who may choose between balls of several norms: ``norm`` and ``eps``, and those in ``also``.

    Attacks made for one ball cannot work within several; give ``EachThreat(PGD())``, which runs an attack within each.
    Bounds, normalisation and mutable features hold for all.

    Args:
        norm: see ``Threat``.
        eps: see ``Threat``.
        low: see ``Threat``.
        high: see ``Threat``.
        mean: see ``Threat``.
        std: see ``Threat``.
        mutable: see ``Threat``.
        also: radii of the further balls by their norms, such as ``{"l2": 1.0}``; at least one.

    Raises:
        ValueError: a setting is out of range; the message names it.

    Guarantees:
        ``enclose`` returns inputs that lie in at least one of the balls (see ``Threat``).

    Reference:
        Tramèr & Boneh, "Adversarial Training and Robustness for Multiple Perturbations", 2019, section 2.
    """

    also: Mapping[str, float | str] = field(default_factory=lambda: {"l2": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.also, Mapping) or not self.also:
            raise ValueError(f'threat.also must hold radii by norm, such as {{"l2": 1.0}}, got {self.also!r}')
        known = [norm for norm in NORMS if norm != self.norm]
        for norm in self.also:
            if norm not in known:
                raise ValueError(f"threat.also must hold norms of {', '.join(known)}, got {norm!r}")
        radii = {norm: parse_number(f"threat.also.{norm}", eps) for norm, eps in self.also.items()}
        object.__setattr__(self, "also", radii)
        self.members  # noqa: B018  (each is checked)

    @property
    def members(self) -> tuple[Threat, ...]:
        """One threat a ball."""
        names = ("low", "high", "mean", "std", "mutable")
        shared = {name: getattr(self, name) for name in names}
        return tuple(Threat(norm, eps, **shared) for norm, eps in {self.norm: self.eps, **self.also}.items())

    def scaled(self, factor: float) -> ThreatUnion:
        first, *others = (member.scaled(factor) for member in self.members)
        return replace(self, eps=first.eps, also={member.norm: member.eps for member in others})

    def describe(self) -> str:
        balls = [member.describe().partition(" in [") for member in self.members]
        return f"union of {' and '.join(ball for ball, _, _ in balls)} in [{balls[0][2]}"

    def enclose(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``Threat.enclose`` of the ball that has to move an example least."""
        found = torch.stack([member.enclose(x_adv, x) for member in self.members])
        wide = torch.nan_to_num(x_adv.detach()).float()
        moved = (found.float() - wide).reshape(len(self.members), len(x), -1).abs().amax(2)
        best = moved.argmin(0)
        return found[best, torch.arange(len(x), device=x.device)]

    def project(self, x_adv: Tensor, x: Tensor, limits: tuple[Tensor, Tensor] | None = None) -> Tensor:
        raise ValueError(_ONE_BALL)

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError(_ONE_BALL)

    def random_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        raise ValueError(_ONE_BALL)

    def ascend(self, grad: Tensor, step_size: float) -> Tensor:
        raise ValueError(_ONE_BALL)


def members_of(threat: Threat) -> tuple[Threat, ...]:
    """The balls of a union, or the threat alone."""
    return threat.members if isinstance(threat, ThreatUnion) else (threat,)


_ONE_BALL = (
    "this attack works within one ball, and the threat has balls of several norms: give EachThreat(attack), which runs "
    "it within each of them"
)
