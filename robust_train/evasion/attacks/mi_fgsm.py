"""The momentum iterative method, with diverse inputs and translation-invariant gradients: made to transfer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import Threat, parse_number
from robust_train.evasion.victim import Victim, input_gradient
from robust_train.evasion.wrapped import WrappedVictim

SMALLEST = 0.9  # share of its side that a resized image keeps at least, about the 299 of 330 pixels of Xie et al.


def resized_and_padded(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """Images shrunk to a random size and put at a random place on a black canvas of the old size.

    Args:
        x: model inputs ``(B, C, H, W)``.
        threat: says how pixels are mapped to model inputs.
        generator: draws one size and one place for the whole batch.
    """
    height, width = x.shape[-2:]
    share = SMALLEST + (1 - SMALLEST) * _uniform(generator)
    rows, columns = round(share * height), round(share * width)
    top, left = (int(_uniform(generator) * (room + 1)) for room in (height - rows, width - columns))
    pixels = F.interpolate(threat.to_pixels(working_precision(x)), size=(rows, columns), mode="bilinear")
    padded = F.pad(pixels, (left, width - columns - left, top, height - rows - top))
    return threat.from_pixels(padded).to(x.dtype)


def smoothed(grad: Tensor, kernel: int) -> Tensor:
    """Gradient images ``(B, C, H, W)`` convolved with a Gaussian of ``kernel`` pixels that spans three deviations."""
    bell = torch.exp(-(torch.linspace(-3, 3, kernel, dtype=grad.dtype, device=grad.device) ** 2) / 2)
    square = torch.outer(bell, bell) / bell.sum() ** 2
    channels = grad.shape[1]
    return F.conv2d(grad, square.expand(channels, 1, kernel, kernel), padding=kernel // 2, groups=channels)


def mi_fgsm(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    diversity: float = 0.0,
    kernel: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Steps along a running sum of gradients, each divided by its mean absolute entry.

    Args:
        victim: the model under attack.
        x: clean inputs ``(B, ...)``; images ``(B, C, H, W)`` for ``diversity`` and ``kernel``.
        threat: ball and box.
        steps: gradient steps, >= 1.
        step_size: length of a step in pixels; None: ``eps / steps`` for Linf, ``2.5 * eps / steps`` for L2 and L1.
        decay: share of the sum that is kept from step to step.
        diversity: probability that a step's gradient is taken at resized and padded images.
        kernel: side of the Gaussian that smooths gradients, odd; 0: none.
        generator: source of the resizing; None: a fresh one with seed 0.

    Returns:
        Tensor of ``x``'s shape, in working precision. Where ``victim.stop_when_fooled`` and ``diversity`` is 0,
        examples leave the attack as soon as one of their iterates is misclassified, and that iterate is returned.

    Raises:
        ValueError: ``diversity`` or ``kernel`` for inputs that are not images.
    """
    if (diversity > 0 or kernel > 0) and x.ndim != 4:
        raise ValueError(
            f"mi_fgsm.diversity and mi_fgsm.kernel need images (B, C, H, W), got inputs {tuple(x.shape)}: set both to 0"
        )
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    if step_size is None:
        step_size = (1.0 if threat.norm == "linf" else 2.5) * threat.radius / steps
    clean = working_precision(x)
    best, alive = clean.clone(), torch.arange(len(x), device=x.device)
    origin, here, momentum = clean, clean, torch.zeros_like(clean)
    for _ in range(steps):
        part = victim if len(alive) == len(x) else victim.take(alive)
        if diversity > 0:
            part = _Diverse(part, threat, diversity, generator)
        grad, _, score = input_gradient(part, here.to(x.dtype))
        if score is not None and bool((score == 0).any()):
            standing = score > 0
            best[alive[~standing]] = here[~standing]
            alive, origin, here = alive[standing], origin[standing], here[standing]
            grad, momentum = grad[standing], momentum[standing]
            if len(alive) == 0:
                return best
        grad = grad.to(clean.dtype)
        grad = smoothed(grad, kernel) if kernel > 0 else grad
        size = grad.abs().reshape(len(grad), -1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
        momentum = decay * momentum + grad / size.view(-1, *[1] * (x.ndim - 1))
        here = threat.project(here + threat.ascend(momentum, step_size), origin)
    best[alive] = here
    return best


@dataclass(frozen=True)
class MIFGSM(Attack):
    """Momentum iterative FGSM (MI), with diverse inputs (DI) and smoothed gradients (TI) as settings.

    Made for ``Transfer``: on large image models its examples fool other models more often than those of FGSM and of
    PGD; on small models it beats FGSM, and PGD may do as well.

    Args:
        steps: gradient steps, >= 1.
        step_size: length of a step in pixels, a number or ``"2/255"``; None: ``eps / steps`` for Linf,
            ``2.5 * eps / steps`` for L2 and L1.
        decay: share of the accumulated gradient that is kept from step to step, >= 0; 0 is iterative FGSM.
        diversity: probability in [0, 1] that a step sees resized and padded images; images only.
        kernel: side in pixels of the Gaussian that smooths the gradient, 0 (none) or odd; images only.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Dong et al., "Boosting Adversarial Attacks with Momentum", 2018, algorithm 1; Xie et al., "Improving
        Transferability of Adversarial Examples with Input Diversity", 2019, section 3.3; Dong et al., "Evading Defenses
        to Transferable Adversarial Examples by Translation-Invariant Attacks", 2019, section 3.
    """

    steps: int = 10
    step_size: float | str | None = None
    decay: float = 1.0
    diversity: float = 0.0
    kernel: int = 0

    def __post_init__(self) -> None:
        check_counts("mi_fgsm", steps=self.steps)
        if self.step_size is not None:
            size = parse_number("mi_fgsm.step_size", self.step_size)
            if not 0 < size < float("inf"):
                raise ValueError(f"mi_fgsm.step_size must be > 0 and finite, got {self.step_size}")
            object.__setattr__(self, "step_size", size)
        for name, highest, says in (("decay", 1e6, "a number >= 0"), ("diversity", 1.0, "in [0, 1]")):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= highest:
                raise ValueError(f"mi_fgsm.{name} must be {says}, got {value!r}")
        whole = isinstance(self.kernel, int) and not isinstance(self.kernel, bool)
        if not whole or self.kernel < 0 or (self.kernel > 0 and self.kernel % 2 == 0):
            raise ValueError(f"mi_fgsm.kernel must be 0 or an odd whole number, got {self.kernel!r}")

    @property
    def passes(self) -> float:
        return float(self.steps)

    @property
    def starts_at_clean_input(self) -> bool:
        return True

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return mi_fgsm(
            victim,
            x,
            threat,
            steps=self.steps,
            step_size=None if self.step_size is None else float(self.step_size),
            decay=self.decay,
            diversity=self.diversity,
            kernel=self.kernel,
            generator=generator,
        )


class _Diverse(WrappedVictim):
    """The victim behind a random resizing, which is no verdict on the image itself."""

    def __init__(self, inner: Victim, threat: Threat, probability: float, generator: torch.Generator) -> None:
        super().__init__(inner)
        self.stop_when_fooled = False
        self._threat, self._probability, self._generator = threat, probability, generator

    def loss(self, x: Tensor) -> Tensor:
        diverse = _uniform(self._generator) < self._probability
        return self.inner.loss(resized_and_padded(x, self._threat, self._generator) if diverse else x)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device))
