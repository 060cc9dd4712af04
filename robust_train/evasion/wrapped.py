"""A victim seen through something: a transformed input, an average over randomness, another loss."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

from torch import Tensor, nn

from robust_train.evasion.victim import Victim


class WrappedVictim(Victim):
    """Passes everything on to another victim; subclasses change what differs.

    Args:
        inner: the victim within.
    """

    def __init__(self, inner: Victim) -> None:
        self.inner, self.labels, self.provides = inner, inner.labels, inner.provides
        self.stop_when_fooled, self.gradient_scale = inner.stop_when_fooled, inner.gradient_scale
        self.gradients = inner.gradients

    def loss(self, x: Tensor) -> Tensor:
        return self.inner.loss(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.inner.logits(x)

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.loss_and_logits(x)

    def take(self, index: Tensor) -> WrappedVictim:
        return self._around(self.inner.take(index))

    def relabelled(self, labels: Tensor) -> WrappedVictim:
        return self._around(self.inner.relabelled(labels))

    def undisturbed(self) -> AbstractContextManager[None]:
        return self.inner.undisturbed()

    def network(self) -> nn.Module:
        return self.inner.network()

    def reseeded(self, seed: int) -> AbstractContextManager[None]:
        return self.inner.reseeded(seed)

    def _around(self, inner: Victim) -> WrappedVictim:
        other = copy.copy(self)
        other.inner, other.labels = inner, inner.labels
        return other
