"""What canaries prove: bounds that hold, and verdicts that are no more than they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robust_train.privacy.accounting import epsilon
from robust_train.privacy.canaries import (
    guess_counts,
    one_run_bound,
    one_run_ceiling,
    one_run_p_value,
    sampling_p_value,
    statistics,
    two_sample_bound,
    two_sample_ceiling,
    verdict,
)


def draws(n: int, seed: int, *, noise: float = 1.0, factor: float = 1.0, rate: float = 0.5, steps: int = 2):
    """Coordinates of canaries that are absent and present under the subsampled Gaussian mechanism."""
    draw = np.random.default_rng(seed)
    absent = noise * draw.normal(size=(n, steps))
    return absent, noise * draw.normal(size=(n, steps)) + factor * (draw.random((n, steps)) < rate)


def bound(n: int, seed: int, delta: float = 0.01, **mechanism: float) -> float:
    absent, present = draws(n, seed, **mechanism)
    return two_sample_bound(statistics(absent, 1.0, 0.5), statistics(present, 1.0, 0.5), delta)


# --- independent draws --------------------------------------------------------------------------------------------


def test_the_bound_stays_below_the_truth_and_comes_near_it():
    claimed = epsilon([(1.0, 0.5, 2)], 0.01, "rdp"), epsilon([(1.0, 0.5, 2)], 0.01, "prv")
    found = [bound(2000, seed) for seed in range(40)]
    assert max(found) < min(claimed)
    assert np.median(found) > 0.4 * min(claimed)


@pytest.mark.parametrize("mechanism", [{"noise": 0.5}, {"factor": 2.0}, {"factor": 100.0}])
def test_more_leakage_than_claimed_is_proved(mechanism):
    claimed = epsilon([(1.0, 0.5, 2)], 0.01, "prv")
    assert min(bound(2500, seed, **mechanism) for seed in range(5)) > claimed


def test_the_bound_of_randomized_response_is_right():
    true, delta = math.log(3), 0.0
    over = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        absent, present = (draw.random((1, 600)) < p for p in (0.25, 0.75))
        over += two_sample_bound(absent.astype(float), present.astype(float), delta) > true
    assert over <= 10


def test_no_draws_reach_beyond_the_ceiling():
    ceiling = two_sample_ceiling(200, 200, 0.01)
    assert two_sample_bound(np.zeros((1, 200)), np.ones((1, 200)), 0.01) == ceiling
    assert bound(200, 0, factor=100.0) <= ceiling
    assert two_sample_ceiling(4000, 4000, 0.01) > ceiling


def test_statistics_are_the_likelihood_ratio_first():
    views = np.array([[0.3, 1.2], [-0.5, 0.0]])

    def ratio(z: float) -> float:
        absent, present = stats.norm.pdf(z, 0, 0.7), stats.norm.pdf(z, 1, 0.7)
        return math.log((0.8 * absent + 0.2 * present) / absent)

    written = [sum(map(ratio, row)) for row in views]
    assert statistics(views, 0.7, 0.2)[0] == pytest.approx(written)
    assert np.isfinite(statistics(views, 0.7, 1.0)).all()


# --- sampling -----------------------------------------------------------------------------------------------------


def joined(kind: str, rate: float = 0.25, seed: int = 0, n: int = 400, steps: int = 40) -> np.ndarray:
    draw = np.random.default_rng(seed)
    if kind == "poisson":
        return draw.random((n, steps)) < rate
    if kind == "wrong rate":
        return draw.random((n, steps)) < 1.1 * rate
    size = round(n * rate)
    if kind == "fixed size":
        return draw.random((n, steps)).argsort(0) < size
    epochs = [np.array_split(draw.permutation(n), round(1 / rate)) for _ in range(round(steps * rate))]
    return np.stack([np.isin(np.arange(n), part) for epoch in epochs for part in epoch], 1)


@pytest.mark.parametrize("kind", ["wrong rate", "fixed size", "shuffled"])
def test_sampling_that_is_not_poisson_is_noticed(kind):
    assert sampling_p_value(joined(kind), 0.25) < 1e-4


def test_poisson_sampling_is_rarely_doubted():
    values = np.array([sampling_p_value(joined("poisson", seed=seed), 0.25) for seed in range(200)])
    assert (values < 0.05).mean() < 0.1
    assert values.min() > 1e-4


# --- one run ------------------------------------------------------------------------------------------------------


def test_without_delta_the_p_value_is_the_binomial_tail():
    right = math.exp(2) / (1 + math.exp(2))
    assert one_run_p_value(90, 100, 500, 2.0, 0.0) == pytest.approx(stats.binom.sf(89, 100, right))


@given(st.integers(1, 300), st.floats(0, 6), st.sampled_from([0.0, 1e-6, 1e-3]), st.data())
@settings(max_examples=60, deadline=None)
def test_the_correction_for_delta_is_that_of_the_paper_written_out(guesses, eps, delta, data):
    correct = data.draw(st.integers(0, guesses))
    canaries = guesses + 10
    right = stats.binom(guesses, 1 / (1 + math.exp(-eps)))
    sums = [sum(right.pmf(correct - j) for j in range(1, i + 1)) / i for i in range(1, min(correct, 40) + 1)]
    alpha = max(sums, default=0.0)
    written = min(1.0, right.sf(correct - 1) + 2 * canaries * delta * alpha)
    found = one_run_p_value(correct, guesses, canaries, eps, delta)
    assert found >= written - 1e-9
    if correct <= 40 or delta == 0:
        assert found == pytest.approx(written, abs=1e-9)


def test_the_bound_of_randomized_responses_is_right():
    true, over, found = 1.0, 0, []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        included = draw.random(400) < 0.5
        honest = draw.random(400) < math.exp(true) / (1 + math.exp(true))
        found.append(one_run_bound(np.where(honest, included, ~included) + 1e-6 * draw.random(400), included, 0.0))
        over += found[-1] > true
    assert over <= 6
    assert np.median(found) > 0.4


def test_the_ceiling_is_what_certainty_finds():
    included = np.arange(300) % 2 == 0
    assert one_run_bound(included.astype(float), included, 1e-5) == pytest.approx(one_run_ceiling(300, 1e-5))
    assert one_run_ceiling(1000, 1e-5) > one_run_ceiling(300, 1e-5) > one_run_ceiling(50, 1e-5) > 0


def test_scores_that_say_nothing_prove_nothing():
    draw = np.random.default_rng(0)
    found = [one_run_bound(draw.random(500), draw.random(500) < 0.5, 1e-5) for _ in range(30)]
    assert np.mean(np.array(found) > 0) <= 0.1


@given(st.integers(1, 5000))
def test_guesses_are_made_about_some_canaries_at_least(canaries):
    counts = guess_counts(canaries)
    assert counts == sorted(set(counts))
    assert 1 <= counts[0] <= counts[-1] == canaries


@pytest.mark.parametrize(
    ("found", "claimed", "ceiling", "said"),
    [(3.0, 2.0, 5.0, "rejected"), (1.0, 2.0, 5.0, "consistent"), (1.0, 8.0, 5.0, "too weak to tell")],
)
def test_a_verdict_is_one_of_three(found, claimed, ceiling, said):
    assert verdict(found, claimed, ceiling) == said
