"""Instance-dependent label noise: what a label becomes depends on the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.poisoning.poisons.base import Poison


def flip_by_input(x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Draw for each row a wrong class, more likely one that its input points to.

    The inputs, standardised by their common mean and deviation, are projected on one random direction for every pair of
    classes; the class is drawn from the softmax of the projections, the true class left out.

    Args:
        x: inputs ``(K, ...)``.
        y: their labels, int64 ``(K,)``.
        classes: how many classes there are.
        generator: draws on the CPU.

    Returns:
        Labels, int64 ``(K,)``, none of them ``y``.
    """
    flat = x.detach().flatten(1).cpu().float()
    flat = (flat - flat.mean()) / flat.std(correction=0).clamp_min(1e-6)
    labels, flipped = y.cpu(), y.cpu().clone()
    for c in range(classes):
        directions = torch.randn(flat.shape[1], classes, generator=generator)  # for every class, whether there are rows
        rows = (labels == c).nonzero()[:, 0]
        if len(rows):
            scores = flat[rows] @ directions
            scores[:, c] = -torch.inf
            flipped[rows] = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    return flipped.to(y.device)


@dataclass(frozen=True, kw_only=True)
class InstanceFlips(Poison):
    """Each label that is taken becomes a class that the input itself makes likely.

    The paper first draws a flip rate for every row, from a truncated normal distribution around ``rate`` that does not
    look at the input, and then flips each row or not. Given how many rows flip, that is a uniform choice of rows, which
    is what is done here; so exactly ``rate`` of them flip.

    Args:
        rate, seed: see ``Poison``.

    Reference:
        Xia et al., "Part-dependent Label Noise: Towards Instance-dependent Label Noise", 2020, algorithm 2.
    """

    relabels_only: ClassVar[bool] = True

    rate: float = 0.2

    def change(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, flip_by_input(x, y, classes, generator)
