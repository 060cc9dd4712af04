"""Randomized smoothing: the class that a model names most often under Gaussian noise, with a radius that is certain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import LARGEST, check_counts
from robust_train.evasion.margins import class_scores
from robust_train.evasion.randomness import generator_for
from robust_train.evasion.threat import Threat, parse_number
from robust_train.intervals import clopper_pearson

BLOCK = 64  # rows of noise drawn at a time, whatever the batch, so that results do not depend on it


def gaussian_noise(x: Tensor, sigma: float, threat: Threat, generator: torch.Generator) -> Tensor:
    """Inputs with normally distributed noise, not clipped to the threat's box.

    Args:
        x: model inputs ``(B, ...)``.
        sigma: standard deviation in pixels, >= 0.
        threat: says how inputs were normalised; its ball plays no part.
        generator: the only source of randomness.

    Returns:
        Tensor of ``x``'s shape and dtype.
    """
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return x + (noise.to(x.device, x.dtype) * (sigma / threat.scale(x))).to(x.dtype)


def lower_confidence_bound(successes: int, n: int, alpha: float) -> float:
    """What a share is at least, from ``successes`` in ``n`` draws, with confidence ``1 - alpha``; exact, one-sided.

    Args:
        successes: 0 to ``n``.
        n: >= 1.
        alpha: in (0, 0.5).

    Reference:
        Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", 1934.
    """
    return clopper_pearson(successes, n, 1 - 2 * alpha)[0]


def noisy_counts(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    threat: Threat,
    *,
    sigma: float,
    n: int,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """How often a model names each class under noise.

    Args:
        model: ``(B, ...)`` to logits ``(B, classes)``, or one score an example.
        x: one example, without the dimension of the batch.
        threat: see ``gaussian_noise``.
        sigma: of the noise, in pixels.
        n: draws, >= 1.
        batch: draws at a time, rounded up to a multiple of 64.
        generator: source of the noise.

    Returns:
        Counts ``(classes,)`` that sum to ``n``; the same for every ``batch``, up to the model's own rounding.
    """
    total, left = torch.zeros(0, dtype=torch.long), n
    block = x.expand(BLOCK, *x.shape)
    with torch.no_grad():
        while left > 0:
            wanted = min(left, math.ceil(batch / BLOCK) * BLOCK)
            blocks = [gaussian_noise(block, sigma, threat, generator) for _ in range(math.ceil(wanted / BLOCK))]
            logits = model(torch.cat(blocks)[:wanted])
            scores, _ = class_scores(logits, torch.zeros(wanted, dtype=torch.long, device=logits.device))
            found = torch.bincount(scores.argmax(1).cpu(), minlength=scores.shape[1])
            total, left = found if len(total) == 0 else total + found, left - wanted
    return total


@dataclass(frozen=True)
class Certificate:
    """What is certain of one example.

    Attributes:
        predicted: class index, or None where the noise was too strong for a statement.
        radius: within this L2 distance, in pixels, the smoothed model names that class; 0 where ``predicted`` is None.
        share: lower confidence bound of the class's share under noise.
    """

    predicted: int | None
    radius: float
    share: float


@dataclass(frozen=True)
class Smoothing:
    """A model smoothed by Gaussian noise: what it predicts, and how far no perturbation can change it.

    ``n0`` draws choose a class, ``n`` others bound its share from below; where the bound is above one half, the
    radius is ``sigma`` times its normal quantile, and otherwise nothing is said.

    Args:
        sigma: standard deviation of the noise in pixels, > 0; a number or ``"1/4"``. The model should have been trained
            with the same.
        n0: draws that choose the class, >= 1.
        n: draws that bound its share, >= 1. With all of them alike the radius is
            ``sigma * quantile(alpha ** (1 / n))``: no more can be certified.
        alpha: how likely the statement may be wrong, for each example, in (0, 0.5).
        batch: draws at a time: memory, not the result.

    Raises:
        ValueError: a setting is out of range.

    Guarantees:
        The statement on an example (predicted class and radius, not the abstention) is wrong with a probability of at
        most ``alpha`` over the noise drawn. The same seed gives the same certificates, whatever the batch.

    Reference:
        Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019, sections 3.1 and 3.2.
    """

    sigma: float | str = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    batch: int = 1024

    def __post_init__(self) -> None:
        sigma = parse_number("smoothing.sigma", self.sigma)
        if not 0 < sigma < math.inf:
            raise ValueError(f"smoothing.sigma must be > 0 and finite, got {self.sigma!r}")
        object.__setattr__(self, "sigma", sigma)
        check_counts("smoothing", n0=self.n0, n=self.n, batch=self.batch)
        alpha = self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 0.5:
            raise ValueError(f"smoothing.alpha must be in (0, 0.5), got {alpha!r}")

    @property
    def largest_radius(self) -> float:
        """What can be certified at most with these draws."""
        return self._radius(lower_confidence_bound(self.n, self.n, self.alpha))

    def certify(
        self, model: Callable[[Tensor], Tensor], x: Tensor, threat: Threat | None = None, *, seed: int = 0, row: int = 0
    ) -> Certificate:
        """Certify one example.

        Args:
            model: in eval mode; ``(B, ...)`` to logits ``(B, classes)``.
            x: one example, without the dimension of the batch.
            threat: says how inputs were normalised; None: they are pixels.
            seed: of the noise, >= 0.
            row: the example's number: each has a stream of its own.
        """
        if not 0 <= seed <= LARGEST:
            raise ValueError(f"smoothing: seed must be a whole number >= 0, got {seed!r}")
        threat, sigma = Threat() if threat is None else threat, float(self.sigma)
        choosing, bounding = (generator_for(x.device, "smoothing", seed, row, part) for part in ("choose", "bound"))
        first = noisy_counts(model, x, threat, sigma=sigma, n=self.n0, batch=self.batch, generator=choosing)
        top = int(first.argmax())
        counts = noisy_counts(model, x, threat, sigma=sigma, n=self.n, batch=self.batch, generator=bounding)
        share = lower_confidence_bound(int(counts[top]), self.n, self.alpha)
        if share <= 0.5:
            return Certificate(None, 0.0, share)
        return Certificate(top, self._radius(share), share)

    def _radius(self, share: float) -> float:
        return float(self.sigma) * NormalDist().inv_cdf(share) if share > 0.5 else 0.0


def certified_at(certificates: Sequence[Certificate], labels: Sequence[int], radius: float) -> list[bool]:
    """Of which examples it is certain that the smoothed model is right within ``radius``.

    Args:
        certificates: one an example.
        labels: class indices.
        radius: L2, in pixels, >= 0.
    """
    return [c.predicted == y and c.radius > radius for c, y in zip(certificates, labels, strict=True)]
