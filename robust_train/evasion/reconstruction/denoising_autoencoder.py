"""A denoising autoencoder that learns, while a model trains, to undo noise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.evasion.attacks._checks import check_counts, is_number
from robust_train.evasion.reconstruction.base import Reconstruction, check_images, check_range


class DenoisingAutoencoder(Reconstruction):
    """Three convolutions that learn to return a clean image from one with Gaussian noise.

    Args:
        channels: of the images, >= 1.
        width: of the layers within, >= 1.
        noise: standard deviation of the noise that it learns to undo, > 0.
        noisy: add that noise to each input before it is reconstructed, also when the model is used; the defence is then
            random.
        low: smallest pixel.
        high: largest pixel.

    Raises:
        ValueError: a setting is out of range; when it is called: no images of so many channels.

    Reference:
        Meng & Chen, "MagNet: a Two-Pronged Defense against Adversarial Examples", 2017, section 4.3 (the reformer);
        broken in Carlini & Wagner, "MagNet and 'Efficient Defenses Against Adversarial Attacks' are Not Robust to
        Adversarial Examples", 2017.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        noise: float = 0.1,
        noisy: bool = False,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        check_counts("denoising_autoencoder", channels=channels, width=width)
        if not is_number(noise) or noise <= 0:
            raise ValueError(f"denoising_autoencoder.noise must be > 0 and finite, got {noise!r}")
        if not isinstance(noisy, bool):
            raise ValueError(f"denoising_autoencoder.noisy must be true or false, got {noisy!r}")
        check_range("denoising_autoencoder", low, high)
        self.channels, self.noise, self.random, self.low, self.high = channels, float(noise), noisy, low, high
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_images("denoising_autoencoder", x)
        if x.shape[1] != self.channels:
            raise ValueError(f"denoising_autoencoder.channels is {self.channels}, and the images have {x.shape[1]}")
        return self._denoised(x + self.noise * torch.randn_like(x) if self.random else x)

    def learning_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        check_images("denoising_autoencoder", x)
        kind: Any = {"generator": generator, "dtype": x.dtype, "device": generator.device}
        noisy = x + self.noise * torch.randn(x.shape, **kind).to(x.device)
        return F.mse_loss(self._denoised(noisy), x)

    def _denoised(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"noise={self.noise:g}, noisy={self.random}"
