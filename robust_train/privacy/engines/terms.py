"""What one pass through one layer adds to the per-example gradients of one parameter, in the cheapest form.

A parameter is seen as a matrix: its first axis, and all others in one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# An inner product of two Gram matrices cancels where positions cancel; what rounding may hide there, in units of the
# sum of the positions' own norms squared.
ROUNDING = {torch.float32: 2.4e-7, torch.float64: 4.4e-16}


class Term(ABC):
    """A matrix for each example, not necessarily written out."""

    @property
    def method(self) -> str:
        """``"instantiate"`` if the matrices are written out for their norms, else ``"ghost"``."""
        return "ghost"

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each example's matrix, shape ``(n,)``."""

    @abstractmethod
    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Sum of the examples' matrices times ``factors``, shape ``(n,)``; of any shape with the matrix' elements."""

    @abstractmethod
    def written_out(self) -> Rows:
        """The matrices themselves."""

    @abstractmethod
    def without(self, examples: Tensor) -> Term:
        """The same with zeros for the examples marked by the boolean ``examples``, shape ``(n,)``."""


@dataclass(frozen=True)
class Rows(Term):
    """Matrices written out, shape ``(n, elements)``."""

    rows: Tensor

    @property
    def method(self) -> str:
        return "instantiate"

    def squared_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.rows, dim=1).square()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return factors @ self.rows

    def written_out(self) -> Rows:
        return self

    def without(self, examples: Tensor) -> Rows:
        return Rows(self.rows.masked_fill(examples[:, None], 0))


def ghost(positions: int, p: int, d: int) -> bool:
    """Whether matrices ``(p, d)`` take more than twice the room of what they are the outer products of.

    If so they are not written out, and their norms take fewer multiplications by Gram matrices, too. If not they take
    its place, as their norms and sum are cheap to tell.

    Reference:
        Bu et al., "Differentially Private Optimization on Large Model at Small Cost", 2023, section 3.2, who compare
        with the room of the Gram matrices, ``2 * positions**2``, which is smaller, but not kept.
    """
    return positions == 1 or 2 * positions * (p + d) <= p * d


@dataclass(frozen=True)
class Outer(Term):
    """Sums over T positions of outer products, in each of ``groups`` blocks of the matrix' rows.

    Attributes:
        left: what runs along the matrix' first axis, shape ``(n, groups, T, p)``: gradients of the layer's outputs.
        right: what runs along its second axis, shape ``(n, groups, T, d)``: the layer's inputs.
    """

    left: Tensor
    right: Tensor

    @property
    def method(self) -> str:
        return "ghost" if ghost(self.left.shape[2], self.left.shape[3], self.right.shape[3]) else "instantiate"

    def squared_norms(self) -> Tensor:
        """By Gram matrices: the ghost norm. Never below the true one by more than rounding of the last place."""
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        left, right = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
        sizes = (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).sqrt().sum(1).square()
        squares = (left * right).sum((1, 2)).clamp(min=0) + ROUNDING[sizes.dtype] * sizes
        return squares.view(self.left.shape[:2]).sum(1)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        left = self.left * factors[:, None, None, None]
        return torch.einsum("ngtp,ngtd->gpd", left, self.right)

    def written_out(self) -> Rows:
        matrices = torch.bmm(self.left.flatten(0, 1).mT, self.right.flatten(0, 1))
        return Rows(matrices.view(len(self.left), -1))

    def without(self, examples: Tensor) -> Outer:
        mask = examples[:, None, None, None]
        return Outer(self.left.masked_fill(mask, 0), self.right.masked_fill(mask, 0))


@dataclass(frozen=True)
class Lookup(Term):
    """A table's rows, added to at given places.

    Attributes:
        ids: rows of the table, shape ``(n, T)``.
        added: what is added to each, shape ``(n, T, d)``.
        length: rows of the table.
    """

    ids: Tensor
    added: Tensor
    length: int

    def squared_norms(self) -> Tensor:
        """By the sums over equal ids, at most T of them for an example."""
        ordered, order = self.ids.sort(dim=1)
        numbers = F.pad((ordered.diff(dim=1) != 0).cumsum(1), (1, 0))  # equal ids share a number below T
        places = torch.empty_like(numbers).scatter_(1, order, numbers)[..., None].expand_as(self.added)
        return torch.zeros_like(self.added).scatter_add_(1, places, self.added).square().sum((1, 2))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        table = self.added.new_zeros(self.length, self.added.shape[2])
        return table.index_add_(0, self.ids.flatten(), (self.added * factors[:, None, None]).flatten(0, 1))

    def written_out(self) -> Rows:
        tables = self.added.new_zeros(len(self.ids), self.length, self.added.shape[2])
        return Rows(tables.scatter_add_(1, self.ids[..., None].expand_as(self.added), self.added).flatten(1))

    def without(self, examples: Tensor) -> Lookup:
        return Lookup(self.ids, self.added.masked_fill(examples[:, None, None], 0), self.length)

    def as_outer(self) -> Outer:
        """As the outer products of one-hot ids with what is added."""
        left = F.one_hot(self.ids, self.length).to(self.added.dtype)
        return Outer(left[:, None], self.added[:, None])


def total(terms: Sequence[Term]) -> Term:
    """The sum of all that reached a parameter, example by example: from tied layers, or several calls of one.

    Args:
        terms: one or more, of equal examples and elements.

    Returns:
        A term whose norms and weighted sums are cheap to tell.
    """
    if all(isinstance(term, Lookup) for term in terms):
        lookups = [term for term in terms if isinstance(term, Lookup)]
        ids, added = torch.cat([t.ids for t in lookups], 1), torch.cat([t.added for t in lookups], 1)
        return Lookup(ids, added, lookups[0].length)
    terms = [term.as_outer() if isinstance(term, Lookup) else term for term in terms]
    outers = [term for term in terms if isinstance(term, Outer)]
    if len(outers) == len(terms):
        outer = outers[0]
        if len(outers) > 1:
            outer = Outer(torch.cat([t.left for t in outers], 2), torch.cat([t.right for t in outers], 2))
        return outer if outer.method == "ghost" else outer.written_out()
    rows = terms[0].written_out().rows
    for term in terms[1:]:
        rows = rows + term.written_out().rows
    return Rows(rows)


def added_up(values: Tensor, examples: int) -> Tensor:
    """The sums over each example's rows, ``(rows, *shape)`` to ``(examples, elements)``."""
    rows = values.reshape(len(values), -1)
    return rows if len(rows) == examples else rows.unflatten(0, (examples, -1)).sum(1)


def wide(tensor: Tensor) -> Tensor:
    """Floating point values of 32 bits at least; anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
