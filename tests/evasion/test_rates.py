"""Intervals of measured shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from robust_train.intervals import clopper_pearson, hoeffding, rate_of


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), share=st.floats(0.001, 0.999), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_the_binomial_interval_covers_every_true_share_as_often_as_it_says(n, share, confidence):
    covered = 0.0
    for successes in range(n + 1):
        low, high = clopper_pearson(successes, n, confidence)
        assert 0 <= low <= successes / n <= high <= 1
        covered += binom.pmf(successes, n, share) if low <= share <= high else 0.0
    assert covered >= confidence - 1e-9


def test_known_intervals():
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert clopper_pearson(10, 10) == (pytest.approx(0.025**0.1), 1.0)
    low, high = clopper_pearson(7, 20)  # R: binom.test(7, 20)$conf.int
    assert (low, high) == (pytest.approx(0.1539092), pytest.approx(0.5921885))


def test_each_end_is_where_a_one_sided_test_just_refuses():
    low, high = clopper_pearson(30, 100)
    assert binom.sf(29, 100, low) == pytest.approx(0.025)
    assert binom.cdf(30, 100, high) == pytest.approx(0.025)


def test_examples_that_count_by_shares_have_the_wider_interval():
    plain, shares = rate_of([1.0, 0.0] * 50), rate_of([0.5] * 100)
    assert plain.value == shares.value == 0.5
    assert (plain.interval, shares.interval) == ("clopper-pearson", "hoeffding")
    assert shares.low < plain.low < plain.high < shares.high
    assert hoeffding(0.5, 100) == (pytest.approx(0.5 - 0.1358102), pytest.approx(0.5 + 0.1358102))
    assert str(plain) == "50.0 % [39.8, 60.2]"
    assert plain.as_dict()["n"] == 100


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: clopper_pearson(3, 2), "successes must be from 0 to n = 2, got 3"),
        (lambda: clopper_pearson(0, 0), "n must be >= 1"),
        (lambda: clopper_pearson(0, 1, 1.0), r"confidence must be in \(0, 1\)"),
        (lambda: hoeffding(1.5, 3), "mean must be"),
        (lambda: rate_of([]), "n must be >= 1"),
        (lambda: rate_of([0.5, 1.5]), r"scores must be in \[0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
