"""The Merkle tree hash: known answers, and that list, accumulator and proofs agree."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_train.custody.merkle import MerkleTree, inclusion_proof, merkle_root, verify_inclusion

# Test vectors of the Certificate Transparency reference implementation.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}

lists = st.lists(st.binary(max_size=4), min_size=1, max_size=70)


@pytest.mark.parametrize(("count", "root"), ROOTS.items())
def test_known_roots(count, root):
    assert merkle_root(LEAVES[:count]).hex() == root
    assert MerkleTree(LEAVES[:count]).root().hex() == root


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + by_definition(leaves[:k]) + by_definition(leaves[k:])).digest()


@given(lists)
def test_list_and_accumulator_follow_the_definition(leaves):
    assert merkle_root(leaves) == by_definition(leaves) == MerkleTree(leaves).root()


@given(lists)
def test_the_accumulator_is_right_after_every_leaf_and_small(leaves):
    tree = MerkleTree()
    for count, leaf in enumerate(leaves, start=1):
        tree.append(leaf)
        assert len(tree) == count
        assert tree.root() == merkle_root(leaves[:count])
        assert len(tree._peaks) <= math.log2(count) + 1


@given(lists)
def test_every_leaf_has_a_proof(leaves):
    root = merkle_root(leaves)
    for index, leaf in enumerate(leaves):
        proof = inclusion_proof(leaves, index)
        assert len(proof) <= math.ceil(math.log2(len(leaves)))
        assert verify_inclusion(leaf, index, len(leaves), proof, root)


@given(lists, st.data())
def test_a_wrong_proof_is_refused(leaves, data):
    index = data.draw(st.integers(0, len(leaves) - 1))
    proof, root, n = inclusion_proof(leaves, index), merkle_root(leaves), len(leaves)
    leaf = leaves[index]
    assert not verify_inclusion(leaf + b"x", index, n, proof, root)
    assert not verify_inclusion(leaf, index, n, [*proof, root], root)
    assert not verify_inclusion(leaf, index, n, proof, bytes(32))
    assert not verify_inclusion(leaf, n, n, proof, root)
    assert not verify_inclusion(leaf, -1, n, proof, root)
    if proof:
        assert not verify_inclusion(leaf, index, n, proof[:-1], root)
        assert not verify_inclusion(leaf, index, n, [proof[0][:31], *proof[1:]], root)


def test_a_node_cannot_pass_for_a_leaf():
    left, right = merkle_root([b"a"]), merkle_root([b"b"])
    assert merkle_root([left + right]) != merkle_root([b"a", b"b"])


@pytest.mark.parametrize("index", [-1, 8])
def test_a_leaf_that_is_not_there_has_no_proof(index):
    with pytest.raises(ValueError, match=f"index must lie between 0 and 7, got {index}"):
        inclusion_proof(LEAVES, index)
