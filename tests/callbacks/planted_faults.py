"""DP-SGD with faults of the kinds that were found in published code: what an audit is there to find."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from robust_train import DPSGD
from robust_train.privacy.sampling import PoissonBatches


class HalfNoise(DPSGD):
    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        entropy = self._running().entropy
        gaussian = entropy.gaussian
        entropy.gaussian = lambda *args: 0.5 * gaussian(*args)


class CountedTwice(DPSGD):
    """Each example stands twice in its batch (clean and adversarial, say), and counts as two people."""

    def _exchange(self, trainer, loader):
        found = super()._exchange(trainer, loader)
        found.batches.views = 2
        return found

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._running().examples *= 2


class NoClipping(DPSGD):
    def _attach(self, trainer, module):
        engine = super()._attach(trainer, module)
        clipped_sum = engine.clipped_sum
        engine.clipped_sum = lambda n, bound, *args, **kwargs: clipped_sum(n, float("inf"), *args, **kwargs)
        return engine


class WrongAccumulation(DPSGD):
    """Lightning divides the loss by the number of micro-batches; here it is multiplied back after the clip."""

    def _attach(self, trainer, module):
        engine = super()._attach(trainer, module)
        clipped_sum = engine.clipped_sum

        def late(*args, scale=1, **kwargs):
            found = clipped_sum(*args, **kwargs)
            torch._foreach_mul_(found.gradients, float(scale))  # pyright: ignore[reportPrivateImportUsage]
            return found

        engine.clipped_sum = late
        return engine


class Shuffled(DPSGD):
    """Each example once an epoch, in batches of a fixed size, reported as Poisson sampling."""

    class Batches(PoissonBatches):
        def __iter__(self) -> Iterator[list[int]]:
            sizes = self.sizes = deque()
            share = np.arange(self.rank, self.size, self.world)
            for chosen in np.array_split(np.random.default_rng().permutation(share), self.steps):
                for place, part in enumerate(np.array_split(chosen, self.micro_batches)):
                    sizes.append((place, len(part)))
                    yield part.tolist()

    def _exchange(self, trainer, loader):
        found = super()._exchange(trainer, loader)
        found.batches.__class__ = Shuffled.Batches
        return found


class Uncounted(DPSGD):
    """The last step of every four is forgotten by the accounting."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        ledger = self._ledger
        *before, (noise, rate, steps) = ledger.history
        if trainer.global_step % 4 == 3:
            ledger.history = [*before, (noise, rate, steps - 1)]


class NoiseOnOneRank(DPSGD):
    """The first process adds noise to the sum that all have, and does not share it."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        entropy = self._running().entropy
        gaussian = entropy.gaussian
        entropy.gaussian = lambda *args: 0 * gaussian(*args)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        entropy.gaussian = gaussian
        if trainer.is_global_zero:
            scale = self._ledger.planned.noise_multiplier * self.max_grad_norm / self._ledger.expected_batch_size
            for p in self._running().parameters:
                p.grad += scale * gaussian(p.numel(), p.device, False).view_as(p)


FAULTS = {
    "half the noise": HalfNoise,
    "an example counted twice": CountedTwice,
    "no clipping": NoClipping,
    "wrong accumulation factor": WrongAccumulation,
    "shuffled, reported as Poisson": Shuffled,
    "steps that are not counted": Uncounted,
}
