"""Classifiers of real digits, trained in a second or two, for tests that need a decision boundary worth attacking."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(1297, 1, 8, 8)`` in [0, 1] and labels, test images ``(500, 1, 8, 8)`` and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def small_cnn() -> nn.Sequential:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def trained(seed: int, *before: nn.Module, epochs: int = 8) -> nn.Sequential:
    """A ``small_cnn`` behind the layers ``before``, trained with cross-entropy, in eval mode."""
    x, y, _, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(*before, *small_cnn())
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net.eval()


@cache
def model(seed: int = 1) -> nn.Sequential:
    """An undefended model, about 98 % right; do not change it."""
    return trained(seed)


def accuracy(net: nn.Module, x: Tensor, y: Tensor, draws: int = 1) -> float:
    """Share that is classified right, the mean over ``draws`` passes."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(99)
        return sum(float((net(x).argmax(1) == y).float().mean()) for _ in range(draws)) / draws
