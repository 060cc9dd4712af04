"""Fixed wavelet features, and the linear classifier on top of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, pad

from ._checks import number, whole, wholes

ENERGY = 1000.0  # squared norm of a block of features whose weight is 1: large beside the 1 of a bias
FLOOR = 3e-3  # responses below it count as none, where pixels go from 0 to 1
SPREAD = 0.35  # standard deviation of a pooling window, in steps of its grid


class WaveletFeatures(nn.Module):
    """A scattering transform of two layers, as logarithms, with every image normalised by itself.

    With Morlet wavelets ``psi[j, t]`` of scale ``2**j`` and orientation ``t``, and Gaussian windows that pool what has
    scale ``j`` to one number for every ``2 * 2**j`` pixels of a side, an image ``x`` turns into five blocks:

    * pixels: ``x``;
    * order 0: ``log(pool(x))``;
    * order 1: ``log(pool(|x * psi[j, t]|))``;
    * order 2: ``log(pool(||x * psi[j, t]| * psi[k, u]|))`` for ``k > j``;
    * means: the mean over space of each map of the orders 0 to 2.

    Each map of the orders 0 to 2 is centred and scaled to variance 1 over its own positions; the pixels and the means
    are, each as a whole. Then each block is scaled to the squared norm ``1000 * weight**2``, so that all images have
    about the same norm, whatever their brightness and contrast. Nothing is learned and nothing is measured on data:
    there are no parameters, no checkpoint holds the filters, and training on features is as private as on images.

    Args:
        shape: shape ``(C, H, W)`` of an image with pixels in [0, 1]; each channel is treated by itself.
        orientations: how many directions the wavelets have.
        scales: how many scales they have; None takes all whose wavelets are no wider than the image, which are three
            for 28 pixels and two for 8.
        weights: weights of the five blocks in the order above; 0 leaves a block out.

    Shapes:
        ``x: (B, C, H, W)``, returns ``(B, self.dim)``.

    Raises:
        ValueError: a setting is out of range, or the images are too small for so many scales.

    References:
        Bruna and Mallat, "Invariant Scattering Convolution Networks", 2013. As the input of private learning: Tramèr
        and Boneh, "Differentially Private Learning Needs Better Features (or Much More Data)", 2021.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 28, 28),
        orientations: int = 6,
        scales: int | None = None,
        weights: Sequence[float] = (0.5, 1.0, 1.5, 1.0, 0.5),
    ) -> None:
        super().__init__()
        wholes("shape", shape, 3)
        whole("orientations", orientations, 1, 1024)
        most = min(shape[1:]).bit_length() - 2
        scales = most if scales is None else scales
        if isinstance(scales, bool) or not isinstance(scales, int) or not 1 <= scales <= most:
            raise ValueError(f"scales must be between 1 and {most} for images of shape {tuple(shape)}, got {scales!r}")
        if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != 5 or not any(weights):
            raise ValueError(f"weights must be five numbers >= 0, not all of them 0, got {weights!r}")
        for index, weight in enumerate(weights):
            number(f"weights[{index}]", weight, "a number >= 0", 0)
        self.shape, self.orientations = tuple(shape), orientations
        self.scales, self.weights = scales, tuple(weights)
        for j in range(scales):
            self.register_buffer(f"wavelets_{j}", morlet(j, orientations), persistent=False)
            self.register_buffer(f"rows_{j}", gaussian_windows(shape[1], j), persistent=False)
            self.register_buffer(f"columns_{j}", gaussian_windows(shape[2], j), persistent=False)
        with torch.no_grad():
            self.dim = self(torch.zeros(1, *shape)).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        scales = range(self.scales)
        moduli = [self._modulus(x, j) for j in scales]
        orders = [[self._log_pool(x, 0)], [self._log_pool(moduli[j], j) for j in scales], []]
        for j in scales:
            for k in scales[j + 1 :]:
                again = self._modulus(moduli[j], k - j)  # they lie 2**j pixels apart, where scale k is scale k - j
                orders[2].append(self._log_pool(again, k))
        means = torch.cat([maps.mean(dim=(-2, -1)) for order in orders for maps in order], dim=1)
        blocks = [[x.flatten(1).unsqueeze(1)], *orders, [means.unsqueeze(1)]]
        weighted = zip(blocks, self.weights, strict=True)
        return torch.cat([_standardise(maps) * weight for maps, weight in weighted if maps and weight], dim=1)

    def _modulus(self, maps: Tensor, scale: int) -> Tensor:
        """Moduli of the wavelet responses of ``maps`` ``(B, M, H, W)``, one for every ``2**scale`` of their pixels.

        They need no finer grid: the modulus takes the waves away and leaves the envelope, which is as wide as that.
        """
        reach = _reach(scale)
        padded = pad(maps.flatten(0, 1).unsqueeze(1), (reach,) * 4, mode="reflect")
        response = conv2d(padded, self.get_buffer(f"wavelets_{scale}"), stride=2**scale)
        real, imaginary = response.chunk(2, dim=1)
        # The constant keeps the derivative finite where an image is flat.
        return (real.square() + imaginary.square() + 1e-12).sqrt().unflatten(0, maps.shape[:2]).flatten(1, 2)

    def _log_pool(self, maps: Tensor, scale: int) -> Tensor:
        rows, columns = self.get_buffer(f"rows_{scale}"), self.get_buffer(f"columns_{scale}")
        return (rows @ maps @ columns.T).clamp(min=0).add(FLOOR).log()


class WaveletLinear(nn.Module):
    """A linear layer on :class:`WaveletFeatures`, which may be computed beforehand.

    The layer starts at zero: all classes are equally likely, and two runs differ by their data and noise alone.

    Args:
        features: what the layer sees of an image.
        classes: how many logits to return.

    Shapes:
        ``x: (B, C, H, W)`` images, or ``(B, features.dim)`` what ``features`` made of them: whatever has two dimensions
        is taken for features. Returns ``(B, classes)``.
    """

    def __init__(self, features: WaveletFeatures, classes: int = 10) -> None:
        super().__init__()
        if not isinstance(features, WaveletFeatures):
            raise TypeError(f"features must be WaveletFeatures, got {features!r}")
        whole("classes", classes, 1, 2**20)
        self.features = features
        self.head = nn.Linear(features.dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if x.ndim == 2 else self.features(x))


def morlet(scale: int, orientations: int) -> Tensor:
    """Morlet wavelets: plane waves under an elongated Gaussian, without their mean.

    Args:
        scale: the wave has ``2**scale * 8 / 3`` pixels a period.
        orientations: how many directions, equally spread over half a turn.

    Returns:
        Real parts, then imaginary parts: ``(2 * orientations, 1, side, side)``.
    """
    sigma, frequency, slant = 0.8 * 2**scale, 0.75 * math.pi / 2**scale, 4 / orientations
    axis = torch.arange(-_reach(scale), _reach(scale) + 1, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = (torch.arange(orientations, dtype=torch.float64) * math.pi / orientations).view(-1, 1, 1)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    envelope = torch.exp(-(along.square() + (slant * across).square()) / (2 * sigma**2))
    envelope *= slant / (2 * math.pi * sigma**2)
    wave = torch.polar(envelope, frequency * along)
    wave -= envelope * (wave.sum((1, 2), keepdim=True) / envelope.sum((1, 2), keepdim=True))
    return torch.cat([wave.real, wave.imag]).float().unsqueeze(1)


def gaussian_windows(size: int, scale: int) -> Tensor:
    """Weights that pool every ``2**scale``-th of ``size`` pixels to one number for every ``2 * 2**scale``.

    Returns:
        ``(ceil(size / (2 * 2**scale)), ceil(size / 2**scale))``, rows that add up to 1.
    """
    pixels = torch.arange(0, size, 2**scale, dtype=torch.float64)
    grid = -(-size // 2 ** (scale + 1))
    spacing = size / grid
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) * spacing - 0.5
    logits = -((pixels - centres.unsqueeze(1)) / (SPREAD * spacing)).square() / 2
    return logits.softmax(dim=1).float()


def _standardise(maps: Sequence[Tensor]) -> Tensor:
    """Each map ``maps[i][b, m]`` with mean 0 and variance 1, all together flattened and of squared norm ``ENERGY``."""
    flat = torch.cat([group_norm(m, m.shape[1]).flatten(1) for m in maps], dim=1)
    return flat * math.sqrt(ENERGY / flat.shape[1])


def _reach(scale: int) -> int:
    """Pixels from the middle of a wavelet to its edge, 2.5 standard deviations."""
    return 2 ** (scale + 1)
