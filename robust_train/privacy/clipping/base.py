"""What a clipping method is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Clipping(ABC):
    """Factors that bound what one example adds to the sum of gradients.

    Guarantees:
        For every example i, the norm over all parameters p of ``factors(norms, bound)[p, i] * norms[p, i]`` is at most
        ``bound``: the sum's L2 sensitivity to adding or removing an example.
    """

    @abstractmethod
    def factors(self, norms: Tensor, bound: float) -> Tensor:
        """Factors for the gradients of each parameter and example.

        Args:
            norms: L2 norms of the per-example gradients, shape ``(parameters, examples)``, float32, finite, >= 0.
            bound: largest norm of an example's whole gradient after clipping, > 0; ``inf`` asks for no clipping.

        Returns:
            Tensor of ``norms``' shape.
        """
