"""Merkle tree hash of a list: one short text that changes when any leaf, or their order, does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of one leaf's data, 32 bytes; the prefix keeps leaves and inner nodes apart."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node from the hashes of its two children, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle tree hash of the leaves' data.

    Args:
        leaves: data of each leaf, in order; of any length each.

    Returns:
        32 bytes; for no leaves the SHA-256 of nothing.

    Guarantees:
        Equals ``MTH`` of the reference, and the root of a ``MerkleTree`` to which the same leaves were appended.

    Reference:
        RFC 6962, "Certificate Transparency", section 2.1.
    """
    level = [leaf_hash(leaf) for leaf in leaves]
    if not level:
        return EMPTY
    while len(level) > 1:
        level = _level_above(level)
    return level[0]


class MerkleTree:
    """The same hash for a list that grows, without keeping the list.

    Guarantees:
        Holds at most ``log2(n) + 1`` hashes after ``n`` leaves.

    Reference:
        RFC 6962, "Certificate Transparency", section 2.1.
    """

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._peaks: list[tuple[int, bytes]] = []  # height and root of each complete subtree, the largest first
        self._count = 0
        for leaf in leaves:
            self.append(leaf)

    def __len__(self) -> int:
        return self._count

    def append(self, leaf: bytes) -> None:
        """Add the data of one leaf at the end."""
        height, top = 0, leaf_hash(leaf)
        while self._peaks and self._peaks[-1][0] == height:
            height, top = height + 1, node_hash(self._peaks.pop()[1], top)
        self._peaks.append((height, top))
        self._count += 1

    def root(self) -> bytes:
        """The Merkle tree hash of all leaves so far, 32 bytes."""
        if not self._peaks:
            return EMPTY
        *larger, (_, top) = self._peaks
        for _, peak in reversed(larger):
            top = node_hash(peak, top)
        return top


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that, with one leaf, give the root: proof that the leaf is in the list, without the other leaves.

    Args:
        leaves: data of each leaf, in order.
        index: of the leaf, ``0 <= index < len(leaves)``.

    Returns:
        At most ``ceil(log2(n))`` hashes of 32 bytes, from the bottom of the tree to its top.

    Raises:
        ValueError: there is no such leaf.

    Reference:
        RFC 6962, section 2.1.1 (audit path).
    """
    if not 0 <= index < len(leaves):
        raise ValueError(f"index must lie between 0 and {len(leaves) - 1}, got {index}")
    proof = []
    level = [leaf_hash(leaf) for leaf in leaves]
    while len(level) > 1:
        if (sibling := index ^ 1) < len(level):
            proof.append(level[sibling])
        index, level = index // 2, _level_above(level)
    return proof


def verify_inclusion(leaf: bytes, index: int, count: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``proof`` shows that the tree of ``count`` leaves with this root has ``leaf`` at ``index``.

    Args:
        leaf: data of the leaf.
        index: where it is said to stand.
        count: number of leaves in the tree.
        proof: what ``inclusion_proof`` returned.
        root: 32 bytes.

    Reference:
        RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < count:
        return False
    here, last, top = index, count - 1, leaf_hash(leaf)
    for sibling in proof:
        if last == 0 or len(sibling) != len(EMPTY):
            return False
        if here % 2 or here == last:
            top = node_hash(sibling, top)
            while here and not here % 2:  # levels at which this node had no sibling
                here, last = here // 2, last // 2
        else:
            top = node_hash(top, sibling)
        here, last = here // 2, last // 2
    return last == 0 and top == root


def _level_above(level: list[bytes]) -> list[bytes]:
    """Hashes of the pairs; an odd one at the end moves up as it is."""
    above = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return above if len(level) % 2 == 0 else [*above, level[-1]]
