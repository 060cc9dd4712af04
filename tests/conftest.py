"""Small models and data that many tests share."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


@pytest.fixture
def net() -> nn.Module:
    """A small image classifier with batch normalisation and dropout, in eval mode, its statistics not trivial."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    model(torch.rand(64, 1, 8, 8))
    with torch.no_grad():  # decisive, and not always for the same class
        model[-1].weight *= 20
        model[-1].bias.zero_()
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    """12 images (12, 1, 8, 8) in [0, 1]."""
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    """Their class indices (12,)."""
    return torch.arange(12) % 10
