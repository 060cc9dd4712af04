"""Epsilon over steps, drawn."""

import math
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from robust_train.privacy.accounting import epsilon
from robust_train.privacy.certificate import Certificate
from robust_train.privacy.plan import PrivacyPlan
from robust_train.report import epsilon_chart, epsilon_over_steps

SVG = "{http://www.w3.org/2000/svg}"
PLAN = PrivacyPlan(noise_multiplier=1.1, sample_rate=0.01, dataset_size=50_000, steps=100, accountant="rdp")


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314


def tips(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}title")]  # noqa: S314


def test_epsilon_and_the_budget_are_drawn():
    svg = epsilon_over_steps([0, 50, 100], [0.0, 1.0, 1.5], target=2.0, subtitle="delta 1e-5")
    assert {"epsilon", "budget: 2", "delta 1e-5", "noisy steps"} <= set(texts(svg))
    assert {"epsilon: 1 at noisy steps 50", "budget: 2: 2 at noisy steps 100"} <= set(tips(svg))


def test_what_is_not_finite_is_left_out():
    assert "epsilon: 1 at noisy steps 5" in tips(epsilon_over_steps([5, 10], [1.0, math.inf]))
    with pytest.raises(ValueError, match="no finite epsilon"):
        epsilon_over_steps([1], [math.inf])
    with pytest.raises(ValueError, match="zip"):
        epsilon_over_steps([1, 2], [1.0])


def test_a_certificate_is_drawn_over_all_its_steps():
    history = [*PLAN.segments(0, 60), (2.0, 0.01, 40)]
    svg = epsilon_chart(Certificate.of(PLAN, history, clipping="flat", engine="hooks", target_epsilon=3.0))
    end = epsilon(history, PLAN.delta, "rdp")
    assert f"epsilon: {end:.6g} at noisy steps 100" in tips(svg)
    assert any("noise multiplier 1.1, 2" in (text or "") for text in texts(svg))


@pytest.mark.parametrize("history", [[], [(0.0, 0.01, 10)], [(1.1, 0.01, 10)], [(1.1, 0.01, 10), (0.0, 0.01, 5)]])
def test_a_void_certificate_is_drawn_as_such(history):
    svg = epsilon_chart(Certificate.of(PLAN, history, clipping="flat", engine="hooks", void=["the seed is known"]))
    assert any("No guarantee: the seed is known" in (text or "") for text in texts(svg))


def test_where_the_accountant_ends_the_line_ends():
    stub = SimpleNamespace(
        history=((0.05, 0.3, 3),), steps=3, delta=1e-5, accountant="prv", void=("x",), target_epsilon=None
    )
    assert "epsilon: 0 at noisy steps 0" in tips(epsilon_chart(stub))
