"""Perturbed outputs: what is still told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robust_train import PerturbedOutputs
from robust_train.privacy.output.label_only import LabelOnly
from robust_train.privacy.output.rounding import Rounding
from robust_train.privacy.output.temperature import Temperature
from robust_train.privacy.output.top_k import TopK

ALL = [Rounding(0), Rounding(2), TopK(1), TopK(3), TopK(50), Temperature(0.5), Temperature(10.0), LabelOnly()]


@pytest.mark.parametrize("output", ALL, ids=str)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 12), sharp=st.sampled_from([0.1, 1.0, 100.0]))
@settings(max_examples=15, deadline=None)
def test_probabilities_stay_probabilities(output, seed, classes, sharp):
    scores = sharp * torch.randn(5, classes, generator=torch.Generator().manual_seed(seed))
    given_out = output(scores.double().softmax(1))
    assert given_out.shape == scores.shape
    assert (given_out >= 0).all()
    assert torch.allclose(given_out.sum(1), torch.ones(5, dtype=torch.float64))


def test_each_tells_what_it_says():
    p = torch.tensor([[0.62, 0.25, 0.09, 0.04]], dtype=torch.float64)
    assert torch.allclose(Rounding(1)(p), torch.tensor([[0.6, 0.2, 0.1, 0.0]], dtype=torch.float64) / 0.9)
    assert torch.allclose(TopK(2)(p), torch.tensor([[0.62, 0.25, 0.065, 0.065]], dtype=torch.float64))
    assert torch.allclose(LabelOnly()(p), torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))
    assert torch.allclose(Temperature(1.0)(p), p)
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    assert torch.allclose(Temperature(3.0)(logits.softmax(1)), (logits / 3).softmax(1))


def test_a_classifier_answers_with_them():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    served = PerturbedOutputs(model, Rounding(1)).eval()
    assert torch.equal(served(x), Rounding(1)(model(x).softmax(1)))
    assert PerturbedOutputs(model, LabelOnly())(x).argmax(1).tolist() == model(x).argmax(1).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rounding(-1), "rounding.decimals must be a whole number from 0 to 15, got -1"),
        (lambda: Rounding(True), "rounding.decimals must be"),
        (lambda: TopK(0), "top_k.k must be a whole number >= 1, got 0"),
        (lambda: Temperature(0), "temperature.temperature must be a number > 0, got 0"),
        (lambda: Temperature("hot"), "temperature.temperature must be"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_perturbation_is_refused():
    with pytest.raises(TypeError, match="must be a robust_train OutputPerturbation"):
        PerturbedOutputs(nn.Linear(2, 2), nn.ReLU())  # pyright: ignore[reportArgumentType]
