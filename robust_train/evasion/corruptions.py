"""Natural corruptions: noise, blur, light, pixels and compression, as bad luck makes them and no attacker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_train.evasion.randomness import generator_for
from robust_train.evasion.threat import Threat

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 32  # pixels of the images for which blurs are given; they grow with the side
# quantisation of luminance, JPEG standard, annex K
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def gaussian_noise(x: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Normal noise with standard deviation ``spread`` on each value of ``x`` ``(B, C, H, W)`` in [0, 1]."""
    return x + spread * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)


def shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Each value is a Poisson count of ``photons`` at most on average: dark places are noisier for their light."""
    counts = torch.poisson((x.clamp(0, 1) * photons).to(generator.device), generator=generator)
    return counts.to(x) / photons


def impulse_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A ``share`` of the values becomes black or white, each with the same chance."""
    draw = torch.rand(x.shape, generator=generator, dtype=torch.float32, device=generator.device).to(x.device)
    out = torch.where(draw < share / 2, torch.zeros_like(x), x)
    return torch.where(draw > 1 - share / 2, torch.ones_like(x), out)


def gaussian_blur(x: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Smoothed with a normal kernel whose standard deviation is ``spread`` pixels of a 32-pixel image."""
    spread = spread * max(x.shape[-2:]) / SIDE
    return _filtered(x, torch.exp(-(_distances(math.ceil(3 * spread)) ** 2) / (2 * max(spread, 1e-6) ** 2)))


def defocus_blur(x: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """Each point becomes a disk of ``radius`` pixels of a 32-pixel image, its edge smooth."""
    radius = radius * max(x.shape[-2:]) / SIDE
    return _filtered(x, (radius + 0.5 - _distances(math.ceil(radius + 0.5))).clamp(0, 1))


def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Values are drawn towards their channel's mean, to ``factor`` of their distance."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def brightness(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """All values are raised by ``amount``."""
    return x + amount


def pixelate(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Averaged down to ``factor`` of each side, and back up in squares."""
    size = [max(1, int(side * factor)) for side in x.shape[-2:]]
    return F.interpolate(F.interpolate(x, size=size, mode="area"), size=x.shape[-2:], mode="nearest")


def jpeg(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """Cosine transforms of 8x8 blocks are rounded as JPEG of this ``quality`` (1 to 100) does, each channel as grey."""
    scale = 50 / quality if quality < 50 else 2 - quality / 50
    table = (torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device) * scale).round().clamp(1, 255)
    basis = _cosines(x)
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8) * 255 - 128  # (B, C, rows, columns, 8, 8)
    rounded = (basis @ blocks @ basis.T / table).round() * table
    blocks = (basis.T @ rounded @ basis + 128) / 255
    whole = blocks.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)
    return whole[..., :height, :width]


Corruption = Callable[[Tensor, float, torch.Generator], Tensor]
# each with its strength at the five severities, those of CIFAR-10-C (but disks that would lie within one pixel)
KINDS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (defocus_blur, (0.7, 0.8, 1.0, 1.25, 1.5)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
}


def corrupt(x: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """One corruption at one severity.

    Args:
        x: images ``(B, C, H, W)`` in [0, 1].
        kind: one of ``KINDS``.
        severity: 1 to 5.
        generator: the only source of randomness; draws are made on its device.

    Returns:
        Images in [0, 1], of ``x``'s shape and dtype.

    Raises:
        ValueError: ``x`` are no images.

    Reference:
        Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019,
        section 3. The strengths follow their CIFAR-10-C; the images are made anew, so that numbers measured on the
        published sets are comparable in kind only.
    """
    if x.ndim != 4:
        raise ValueError(f"corruptions are for images (B, C, H, W), got {tuple(x.shape)}")
    apply, strengths = KINDS[kind]
    fine = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return apply(fine, strengths[severity - 1], generator).clamp(0, 1).to(x.dtype)


@dataclass(frozen=True)
class Corruptions:
    """Which natural corruptions a model is measured under, and at which severities.

    Args:
        kinds: names, of ``gaussian_noise``, ``shot_noise``, ``impulse_noise``, ``gaussian_blur``, ``defocus_blur``,
            ``contrast``, ``brightness``, ``pixelate`` and ``jpeg``.
        severities: of 1 to 5.

    Raises:
        ValueError: there is none, or one that is not known.

    Guarantees:
        The same seed gives the same images; the input is not written to.
    """

    kinds: Sequence[str] = tuple(KINDS)
    severities: Sequence[int] = SEVERITIES

    def __post_init__(self) -> None:
        for name, known in (("kinds", tuple(KINDS)), ("severities", SEVERITIES)):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value or len({*map(repr, value)}) < len(value):
                raise ValueError(f"corruptions.{name} must be a list of different ones of {known}, got {value!r}")
            for item in value:
                if isinstance(item, bool) or item not in known:
                    raise ValueError(f"corruptions.{name} must be among {', '.join(map(str, known))}, got {item!r}")
            object.__setattr__(self, name, tuple(value))

    @property
    def names(self) -> tuple[str, ...]:
        """``<kind>/<severity>`` of each."""
        return tuple(f"{kind}/{severity}" for kind in self.kinds for severity in self.severities)

    def of(self, x: Tensor, threat: Threat, *seed: int | str) -> Iterator[tuple[str, Tensor]]:
        """Each corruption's name, and the images under it.

        Args:
            x: clean model inputs ``(B, C, H, W)``.
            threat: says where inputs live, and how they were normalised; eps plays no part.
            seed: parts of the seed.

        Raises:
            ValueError: the threat's range is not finite, or these are no images.
        """
        low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (threat.low, threat.high))
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError("corruptions need a finite range of inputs: set threat.low and threat.high")
        if x.ndim != 4:
            raise ValueError(f"corruptions are for images (B, C, H, W), got {tuple(x.shape)}")
        low, width = low.reshape(1, -1, 1, 1), (high - low).reshape(1, -1, 1, 1)
        unit = (threat.to_pixels(x) - low) / width
        for kind in self.kinds:
            for severity in self.severities:
                generator = generator_for(x.device, "corruption", kind, severity, *seed)
                corrupted = corrupt(unit, kind, severity, generator)
                yield f"{kind}/{severity}", threat.from_pixels(corrupted * width + low)


def _distances(reach: int) -> Tensor:
    """Of each cell of a square to its middle ``(2 * reach + 1, 2 * reach + 1)``."""
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return torch.sqrt(line[:, None] ** 2 + line[None, :] ** 2)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel convolved with a kernel that is made to sum to 1; the border is repeated outwards."""
    weights = (kernel / kernel.sum()).to(x)[None, None].expand(x.shape[1], 1, *kernel.shape)
    reach = kernel.shape[0] // 2
    return F.conv2d(F.pad(x, (reach, reach, reach, reach), mode="replicate"), weights, groups=x.shape[1])


def _cosines(x: Tensor) -> Tensor:
    """The orthonormal cosine transform of 8 values, ``(8, 8)``."""
    place = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * place[None, :] + 1) * place[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis.to(x)
