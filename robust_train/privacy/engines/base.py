"""What an engine is: per-example gradients of a module, from the one backward pass of a mean loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from robust_train.privacy.clipping.base import Clipping


@dataclass(frozen=True)
class ClippedSum:
    """What one micro-batch adds to the step.

    Attributes:
        gradients: the sums over the examples of their weighted, clipped gradients, one for each of the engine's
            parameters, of its shape; float32 (float64 where the parameter is).
        norms: L2 norm of each example's gradient before clipping, shape ``(examples,)``; not finite where the example's
            gradient was not.
        zeroed: how many examples of weight > 0 had a gradient that was not finite, and so contributed zero.
    """

    gradients: list[Tensor]
    norms: Tensor
    zeroed: int


class Engine(ABC):
    """Records a forward and backward pass of a module, and returns the sum of its clipped per-example gradients.

    The loss is the mean over the rows of the batch, times ``1 / scale``. Between ``start`` and ``stop`` passes are
    recorded, except within ``paused()``; elsewhere the module behaves as if the engine were not there. After
    ``close`` the module is as it was before.

    ::

        engine.start()
        loss = training_step(batch)        # any number of forward passes, and attacks
        engine.arm()
        loss.backward()                    # one backward pass
        result = engine.clipped_sum(...)
        engine.stop()

    Args:
        module: whose per-example gradients are wanted. Nothing in it is exchanged, no state-dict key changes.
        parameters: of the module, each requiring a gradient; the order of everything returned.

    Raises:
        UnsupportedLayer: a layer has parameters among these, and no rule.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.module, self.parameters = module, list(parameters)
        self._names = {p: name for name, p in module.named_parameters()}

    @abstractmethod
    def start(self) -> None:
        """Record from here on; what was recorded before is forgotten."""

    @abstractmethod
    def stop(self) -> None:
        """Record no longer, and forget what was recorded."""

    @abstractmethod
    def arm(self) -> None:
        """The next backward pass is the one to record.

        Call it between the last forward pass and the ``backward()`` of the training loss. Backward passes since
        ``start`` that come before it, as attacks make them, are not recorded. ``clipped_sum``, ``start`` and ``stop``
        disarm.
        """

    @contextmanager
    @abstractmethod
    def paused(self) -> Iterator[None]:
        """Passes inside are not recorded, whatever they differentiate: attacks, extra evaluations."""
        yield

    @abstractmethod
    def clipped_sum(
        self,
        examples: int,
        bound: float,
        clipping: Clipping,
        *,
        views: int = 1,
        scale: float = 1.0,
        weights: Tensor | None = None,
    ) -> ClippedSum:
        """The sum of what was recorded since ``start``, which is forgotten thereby.

        An example is ``views`` consecutive rows of the batch, whose gradients are averaged before the clip
        (De et al., "Unlocking High-Accuracy Differentially Private Image Classification through Scale", 2022,
        section 3.2): the batch had ``examples * views`` rows.

        Args:
            examples: number of examples in the batch, > 0.
            bound: clipping norm.
            clipping: how to clip to it.
            views: rows of each example, > 0.
            scale: what the mean loss was divided by before it was backpropagated.
            weights: factor on each example's clipped gradient, in [0, 1], shape ``(examples,)``; None: ones.

        Raises:
            RowsMismatch: a layer's recorded rows are not ``examples * views``, nothing was recorded, or a gradient
                reached a parameter by another way than through its layer, where the engine can tell. Several backward
                passes, and forward passes of an earlier step, raise in the backward pass itself.
        """

    @abstractmethod
    def close(self) -> None:
        """Take everything off the module again."""


class UnsupportedLayer(ValueError):
    """A layer whose per-example gradients this engine cannot tell."""


class RowsMismatch(RuntimeError):
    """What was recorded cannot be split by example."""
