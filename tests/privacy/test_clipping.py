"""What a clipping method promises: the sum moves by no more than the bound when one example comes or goes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_train.privacy.clipping.automatic import Automatic
from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.clipping.per_layer import PerLayer

METHODS = [Flat(), PerLayer(), Automatic(), Automatic(stability=1e-6)]
norms = st.lists(
    st.lists(st.floats(0, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=5
)  # parameters x examples


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(norms=norms, bound=st.floats(1e-3, 1e3))
def test_no_example_exceeds_the_bound(method, norms, bound):
    norms = torch.tensor(norms)
    factors = method.factors(norms, bound)
    assert factors.shape == norms.shape
    assert (factors >= 0).all()
    assert ((factors * norms).norm(dim=0) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_infinite_bound_clips_nothing(method):
    norms = torch.tensor([[0.0, 1.0, 1e9], [2.0, 0.0, 1e9]])
    assert torch.equal(method.factors(norms, math.inf), torch.ones(2, 3))


@given(norms=norms)
def test_flat_leaves_small_gradients_alone_and_keeps_directions(norms):
    norms = torch.tensor(norms)
    factors = Flat().factors(norms, 1.0)
    assert (factors[:, norms.norm(dim=0) < 0.999] == 1).all()
    assert (factors == factors[:1]).all()


def test_flat_is_opacus_own():
    norms = torch.rand(3, 50) * 3
    theirs = (1.3 / (norms.norm(2, dim=0) + 1e-6)).clamp(max=1.0)  # DPOptimizer.clip_and_accumulate
    assert torch.equal(Flat().factors(norms, 1.3), theirs.expand(3, 50))


def test_per_layer_clips_each_parameter_by_itself():
    factors = PerLayer().factors(torch.tensor([[10.0], [0.1], [0.0], [10.0]]), 1.0)
    torch.testing.assert_close(factors, torch.tensor([[0.05], [1.0], [1.0], [0.05]]))


def test_automatic_gives_all_but_small_gradients_the_same_norm():
    norms = torch.tensor([[0.01, 1.0, 100.0]])
    torch.testing.assert_close(Automatic().factors(norms, 2.0) * norms, torch.tensor([[1.0, 2 / 1.01, 200 / 100.01]]))


def test_automatic_needs_a_positive_stability():
    with pytest.raises(ValueError, match=r"automatic\.stability must be > 0"):
        Automatic(stability=0.0)
