"""Poisson sampling, cut into micro-batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np

from robust_train.privacy.entropy import Entropy


class PoissonBatches:
    """A batch sampler: every example enters every logical batch by a coin flip of its own.

    A logical batch is emitted as exactly ``micro_batches`` lists of indices, so that a loop that accumulates gradients
    over that many batches steps once for each. An empty one becomes the single index ``rank``, of weight 0: code that
    trains never sees a batch without rows.

    Args:
        size: number of examples in the dataset.
        sample_rate: probability of each example, in (0, 1].
        steps: logical batches of one pass.
        micro_batches: lists of indices for each.
        views: how often each index is repeated within its list.
        rank: which share of the examples is sampled here: those whose index is ``rank`` modulo ``world``.
        world: number of shares. Shares are disjoint, so no seed has to be agreed on.
        entropy: where the coin flips come from.

    Attributes:
        sizes: for each list that was emitted and not yet taken off at the left: its place within the logical batch,
            from 0 on, and its number of examples, 0 where the list stands for an empty one.
        skip: lists of the first logical batch that are left out, which is then cut into the remaining ones: for a run
            that is resumed within a logical batch.

    Guarantees:
        Within one logical batch no index occurs in two lists, nor more than ``views`` times in one.
    """

    def __init__(
        self,
        size: int,
        sample_rate: float,
        steps: int,
        micro_batches: int,
        *,
        views: int = 1,
        rank: int = 0,
        world: int = 1,
        entropy: Entropy,
    ) -> None:
        self.size, self.sample_rate, self.steps, self.micro_batches = size, sample_rate, steps, micro_batches
        self.views, self.rank, self.world, self.entropy = views, rank, world, entropy
        self.sizes: deque[tuple[int, int]] = deque()
        self.skip = 0

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        sizes = self.sizes = deque()  # a new one: what an abandoned pass left must not be taken for this one's
        share, skip = np.arange(self.rank, self.size, self.world), self.skip
        self.skip = 0
        for _ in range(self.steps):
            chosen = share[self.entropy.uniform(len(share)) < self.sample_rate]
            for place, part in enumerate(np.array_split(chosen, self.micro_batches - skip), skip):
                sizes.append((place, len(part)))
                indices = part if len(part) else np.array([min(self.rank, self.size - 1)])
                yield np.repeat(indices, self.views).tolist()
            skip = 0


def micro_batches_for(size: int, sample_rate: float, world: int, examples: int) -> int:
    """How many micro-batches keep each at ``examples`` or fewer, but for an event of six standard deviations.

    Args:
        size: number of examples in the dataset.
        sample_rate: probability of each.
        world: processes that share them.
        examples: the most that one micro-batch of one process should hold.
    """
    mean = size * sample_rate / world
    largest = min(size / world, mean + 6.0 * math.sqrt(mean * (1.0 - sample_rate)) + 1.0)
    return max(1, math.ceil(largest / examples))
