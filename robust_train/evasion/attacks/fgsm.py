"""The fast gradient sign method and its two single-step training variants, FGSM-RS and N-FGSM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim, input_gradient


def fgsm(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    step: float = 1.0,
    noise: float = 0.0,
    project: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One gradient step: ``x + noise + step * eps * ascent(grad)``.

    Args:
        victim: the model under attack.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        step: length of the step as a multiple of ``eps``, > 0.
        noise: radius of the random start as a multiple of ``eps``, >= 0.
        project: whether the result is put back into the ball; the box always holds.
        generator: source of the random start; None: a fresh one with seed 0.

    Returns:
        Tensor of ``x``'s shape, in working precision.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    clean = working_precision(x)
    ball = threat if project else threat.scaled(step + noise)
    start = threat.scaled(noise).random_start(clean, generator) if noise > 0 else clean
    grad, _, _ = input_gradient(victim, start.to(x.dtype))
    return ball.project(start + threat.ascend(grad.to(clean.dtype), step * threat.radius), clean)


@dataclass(frozen=True)
class FGSM(Attack):
    """Single-step attack.

    ``FGSM()`` is Goodfellow et al.'s; ``FGSM(step=1.25, noise=1)`` is FGSM-RS, the start of "fast" adversarial
    training; ``FGSM(noise=2, project=False)`` is N-FGSM, whose examples leave the ball on purpose: for training only.

    Args:
        step: length of the step as a multiple of ``eps``, > 0.
        noise: radius of the uniform random start as a multiple of ``eps``, >= 0.
        project: put the result back into the ball.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, section 4; Wong et al., "Fast is
        Better than Free", 2020, algorithm 3; de Jorge et al., "Make Some Noise", 2022, algorithm 1.
    """

    step: float = 1.0
    noise: float = 0.0
    project: bool = True

    def __post_init__(self) -> None:
        for name in ("step", "noise"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf") or (name == "step" and value == 0):
                raise ValueError(f"fgsm.{name} must be {'>' if name == 'step' else '>='} 0 and finite, got {value!r}")
        if not isinstance(self.project, bool):
            raise ValueError(f"fgsm.project must be true or false, got {self.project!r}")

    @property
    def reach(self) -> float:
        return 1.0 if self.project else self.step + self.noise

    @property
    def starts_at_clean_input(self) -> bool:
        return self.noise == 0

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return fgsm(victim, x, threat, step=self.step, noise=self.noise, project=self.project, generator=generator)
