from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_train.poisoning.decide import (
    Verdict,
    by_canaries,
    by_conflict,
    by_exclusion,
    confirmed,
    decide,
    labels_like,
    share_of_noise,
)
from robust_train.poisoning.policy import Policy

POLICY = {"target_fpr": 0.01, "min_power": 0.3}


@st.composite
def flagged_rows(draw):
    """Flags and scores of some filters, labels, caps, and restored rows."""
    n, classes, filters = draw(st.integers(1, 60)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.floats(0, 1))
    caps = {k: draw(st.floats(0.01, 1.0)) for k in ("max_drop", "max_drop_per_class")}
    names = [f"filter {i}" for i in range(filters)]
    flagged = {name: rng.random(n) < share for name in names}
    scores = {name: rng.integers(0, 5, n) + rng.random() for name in names}
    restored = np.flatnonzero(rng.random(n) < 0.1)
    return flagged, scores, rng.integers(0, classes, n), Policy(**caps), restored


@given(flagged_rows())
@settings(max_examples=200, deadline=None)
def test_caps_are_never_exceeded_and_restored_rows_never_touched(case):
    flagged, scores, labels, policy, restored = case
    before = {name: rows.copy() for name, rows in flagged.items()}
    outcome = decide(flagged, scores, labels, policy, restored)
    wanted = np.any(list(flagged.values()), axis=0)
    wanted[restored] = False
    assert outcome.touched.sum() <= policy.max_drop * len(labels)
    for label in np.unique(labels):
        assert outcome.touched[labels == label].sum() <= policy.max_drop_per_class * (labels == label).sum()
    assert not outcome.touched[restored].any()
    assert ((outcome.touched | outcome.capped) == wanted).all()
    assert not (outcome.touched & outcome.capped).any()
    assert bool(outcome.notes) == bool(outcome.capped.any())
    assert all((flagged[name] == before[name]).all() for name in flagged)


def test_beyond_a_cap_the_least_suspicious_are_kept():
    flagged = {"a": np.arange(10) >= 4, "b": np.arange(10) == 4}
    scores = {"a": np.arange(10.0), "b": np.arange(10.0)}
    outcome = decide(flagged, scores, np.zeros(10, dtype=int), Policy(max_drop=0.3, max_drop_per_class=1.0))
    assert np.flatnonzero(outcome.touched).tolist() == [4, 8, 9]  # 4: two filters flag it
    assert "6 rows of the data were flagged, and no more than 3 may be touched (0.3)" in outcome.notes[0]
    assert "your consent" in outcome.notes[0]


def test_a_class_has_a_cap_of_its_own():
    labels = np.array([0] * 4 + [1] * 16)
    outcome = decide({"a": labels == 0}, {"a": np.arange(20.0)}, labels, Policy())
    assert np.flatnonzero(outcome.touched).tolist() == [2, 3]
    assert "4 rows of class 0" in outcome.notes[0]


# --- the share of noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("apart", [2.0, 4.0])
def test_the_share_of_noise_in_a_mixture_is_estimated(share, apart):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        bad = rng.random(4000) < share
        scores = rng.normal(apart * bad, 1.0)
        found = share_of_noise(scores, rng.normal(apart, 1.0, 200))
        assert share - 0.1 <= found <= share + 0.1


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_a_share_is_a_share(seed, n, k):
    rng = np.random.default_rng(seed)
    assert 0 <= share_of_noise(rng.normal(size=n).round(1), rng.normal(size=k).round(1)) <= 1


# --- thresholds from canaries --------------------------------------------------------------------------------------


def mixture(seed, share=0.0, apart=4.0, n=4000, canaries=200):
    """Scores of rows of which some are noise and some canaries: the scores, which is a canary, which is noise."""
    rng = np.random.default_rng(seed)
    canary = np.arange(n) < canaries
    noise = (rng.random(n) < share) & ~canary
    return rng.normal(apart * (canary | noise), 1.0), canary, noise


@pytest.mark.parametrize("target", [0.005, 0.01, 0.05])
@pytest.mark.parametrize("apart", [0.0, 0.25, 1.0, 1.5, 3.0, 4.0])
def test_clean_rows_are_flagged_at_about_the_target_rate_at_most(target, apart):
    """Also where canaries are hard to tell from clean rows: then nothing is flagged."""
    rates = []
    for seed in range(20):
        scores, canary, _ = mixture(seed, apart=apart)
        verdict = by_canaries(scores, canary, target_fpr=target, min_power=0.3)
        rates.append(verdict.flagged[~canary].mean())
        assert verdict.threshold is not None or not verdict.flagged.any()
        assert verdict.calibration.get("expected_fpr", 0) <= target
        assert not verdict.flagged[canary].any()
    assert np.mean(rates) <= 2 * target
    assert np.median(rates) <= (1.2 if target <= 0.01 else 2) * target


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_noise_like_the_canaries_is_found(share):
    for seed in range(5):
        scores, canary, noise = mixture(seed, share)
        verdict = by_canaries(scores, canary, **POLICY)
        assert verdict.flagged[noise].mean() >= 0.7  # 0.75 is what the best threshold finds at this rate
        assert verdict.flagged[~noise & ~canary].mean() <= 0.03
        assert verdict.calibration["power"] >= 0.7
        assert verdict.flagged.sum() == (scores[~canary] > verdict.threshold).sum()


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.floats(0, 1), st.integers(30, 200))
@settings(max_examples=100, deadline=None)
def test_what_is_too_weak_decides_nothing(seed, canaries, power, n):
    rng = np.random.default_rng(seed)
    scores, canary = rng.normal(size=n).round(1), np.arange(n) < canaries
    verdict = by_canaries(scores, canary, target_fpr=0.05, min_power=max(power, 0.01))
    if verdict.threshold is None:
        assert not verdict.flagged.any()
        assert "nothing is decided" in verdict.calibration["note"]
    else:
        assert canaries >= 10
        assert verdict.calibration["power"] >= power
        assert (verdict.flagged == (scores > verdict.threshold) & ~canary).all()


def test_canaries_that_look_like_clean_rows_decide_nothing():
    scores, canary, _ = mixture(0, apart=0.0)
    verdict = by_canaries(scores, canary, **POLICY)
    assert not verdict.flagged.any()
    assert verdict.calibration["note"].startswith("too weak")
    assert verdict.calibration["power"] < 0.3


@pytest.mark.parametrize("canaries", [0, 9])
def test_too_few_canaries_decide_nothing(canaries):
    scores, canary, _ = mixture(0, canaries=canaries)
    assert "too few" in by_canaries(scores, canary, **POLICY).calibration["note"]
    assert "too few" in by_canaries(np.ones(20), np.ones(20, dtype=bool), **POLICY).calibration["note"]


def test_canaries_are_judged_where_the_scores_are_those_of_their_own_labels():
    rng = np.random.default_rng(0)
    canary, bad = np.arange(4000) < 200, np.arange(4000) % 10 == 0
    scores = rng.normal(4.0 * bad, 1.0)
    verdict = by_canaries(scores, canary, canary_scores=rng.normal(4.0, 1.0, 200), **POLICY)
    assert verdict.flagged[bad & canary].mean() > 0.6
    assert verdict.flagged[~bad & canary].mean() < 0.05


def test_rows_that_are_more_likely_right_than_wrong_are_kept():
    """A broad shoulder of hard rows below the wrong ones, which an estimate of their share that is too high lets in."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        canary, kind = np.arange(6000) < 200, rng.random(6000)
        wrong, hard = (kind < 0.1) & ~canary, (kind > 0.9) & ~canary
        where = np.select([wrong | canary, hard], [6.0, 3.0], 0.0)
        verdict = by_canaries(rng.normal(where, 1.0), canary, target_fpr=0.05, min_power=0.3)
        assert verdict.flagged[wrong].mean() >= 0.85
        assert verdict.flagged[hard].mean() <= 0.2


def test_trusted_rows_that_look_suspicious_raise_the_threshold():
    scores, canary, _ = mixture(0, 0.1)
    null = np.random.default_rng(1).normal(2.0, 1.0, 500)
    loose = by_canaries(scores, canary, **POLICY)
    strict = by_canaries(scores, canary, null=null, **POLICY)
    assert strict.threshold is not None
    assert loose.threshold is not None
    assert strict.threshold > loose.threshold
    assert (null > strict.threshold).mean() <= 0.011
    far = by_canaries(scores, canary, null=null + 9, **POLICY)
    assert far.threshold is None
    assert not far.flagged.any()


def test_equal_scores_are_flagged_alike():
    scores = np.repeat([0.0, 1.0], [900, 100])
    verdict = by_canaries(scores, np.arange(1000) >= 950, **POLICY)
    assert len(set(verdict.flagged[900:950])) == 1
    assert not verdict.flagged[:900].any()


def test_a_conflict_needs_no_calibration():
    verdict = by_conflict(np.array([0.0, 0.4, 0.5, 1.0]))
    assert verdict.flagged.tolist() == [False, False, True, True]
    assert verdict.calibration["expected_fpr"] == 0.0


# --- groups --------------------------------------------------------------------------------------------------------

WRONG = np.linspace(5, 15, 200)  # how canaries contradict their wrong labels
OWN = np.full(200, -5.0)


@pytest.mark.parametrize(
    ("agree", "contradiction", "size", "of_class", "bad"),
    [
        (0.0, 10.0, 40, 400, True),  # like the canaries
        (0.2, 10.0, 40, 400, True),
        (0.5, 10.0, 40, 400, False),  # half of it is recognised
        (0.0, 1.0, 40, 400, False),  # weaker than every canary
        (0.0, 6.5, 40, 400, False),  # 15 % of the canaries are weaker: less than one standard error above the limit
        (0.0, 8.0, 40, 400, True),
        (0.0, 8.0, 40, 100, True),  # large in its class, 30 % of the canaries are weaker
        (0.0, 7.4, 40, 100, False),
        (0.0, 10.0, 3, 400, True),
        (0.0, 7.5, 3, 400, False),  # of a few rows more is asked
        (1.0, -5.0, 40, 400, False),
    ],
)
def test_a_group_is_judged_by_agreement_and_by_how_it_contradicts(agree, contradiction, size, of_class, bad):
    n = of_class + 100
    labels, groups = np.repeat([0, 1], [of_class, 100]), np.full(n, -1)
    groups[:size] = 7
    margins = np.full(n, -5.0)
    margins[:size] = contradiction
    margins[: round(agree * size)] = -5.0
    verdict = by_exclusion(groups, margins, OWN, WRONG, labels)
    few = agree <= 0.05  # rows that bear their label by chance go with the group
    assert np.array_equal(verdict.flagged[:size], bad & (few | (margins[:size] > 0)))
    assert not verdict.flagged[size:].any()
    assert [(g["group"], g["rows"], g["flagged"]) for g in verdict.calibration["groups"]] == [(7, size, bad)]
    assert verdict.threshold is None


def test_a_model_that_recognises_too_little_judges_no_group():
    groups, margins = np.array([0] * 40 + [-1] * 360), np.full(400, 10.0)
    own = np.where(np.arange(200) < 99, -5.0, 5.0)
    verdict = by_exclusion(groups, margins, own, WRONG, np.zeros(400, dtype=int))
    assert not verdict.flagged.any()
    assert verdict.calibration["note"].startswith("too weak")
    assert not verdict.calibration["groups"][0]["flagged"]
    own[99] = -5.0
    assert by_exclusion(groups, margins, own, WRONG, np.zeros(400, dtype=int)).flagged.any()


def test_without_canaries_no_group_is_judged():
    groups, margins = np.array([0] * 10 + [-1] * 10), np.full(20, 10.0)
    verdict = by_exclusion(groups, margins, OWN[:5], WRONG[:5], np.zeros(20, dtype=int))
    assert not verdict.flagged.any()
    assert "too few canaries" in verdict.calibration["note"]
    assert not by_exclusion(groups, margins, OWN[:0], WRONG[:0], np.zeros(20, dtype=int)).flagged.any()


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "burn"},
        {"target_fpr": 0},
        {"min_power": 1.1},
        {"max_drop": True},
        {"max_drop_per_class": -0.1},
        {"weight": 0.0},
        {"weight": "half"},
        {"target_fpr": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"policy.{next(iter(wrong))} must be"):
        Policy(**wrong)


def test_what_a_model_agrees_with_that_did_not_learn_it_is_not_flagged():
    verdict = Verdict(np.array([True, True, False, True]), 1.0, {"method": "label canaries"})
    margins = np.array([2.0, -1.0, 3.0, 0.5])
    reference = Verdict(margins > 1.0, 1.0, {})
    found = confirmed(verdict, reference, margins)
    assert found.flagged.tolist() == [True, False, False, False]
    assert found.calibration["note"].startswith("2 rows are kept")
    weak = Verdict(np.zeros(4, dtype=bool), None, {})
    assert confirmed(verdict, weak, margins).flagged.tolist() == [True, False, False, True]


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_labels_that_are_drawn_are_wrong_ones(seed, classes, suspects):
    rng = np.random.default_rng(seed)
    seen, given_ = (rng.integers(0, classes, suspects) for _ in range(2))
    taken_for, labels = (rng.integers(0, classes, 50) for _ in range(2))
    found = rng.random((50, classes)) < rng.random()
    drawn = labels_like(seen, given_, taken_for, found, labels, draws=3, seed=seed)
    assert drawn.shape == (3, 50)
    assert ((drawn >= 0) & (drawn < classes) & (drawn != labels)).all()
    assert (drawn == labels_like(seen, given_, taken_for, found, labels, draws=3, seed=seed)).all()


CANARIES = np.arange(5000) % 5


def test_labels_are_drawn_as_the_suspects_bear_them():
    seen = np.arange(100) % 3
    all_found = np.ones((5000, 5), dtype=bool)
    drawn = labels_like(seen, (seen + 1) % 5, CANARIES, all_found, CANARIES, draws=2, seed=0)
    next_one = drawn == (CANARIES + 1) % 5
    assert next_one[:, CANARIES < 3].all()
    assert next_one[:, CANARIES >= 3].mean() == pytest.approx(0.25, abs=0.03)  # nothing is known of them


def test_suspects_that_are_seldom_found_count_for_more():
    found = np.random.default_rng(0).random((5000, 5)) < np.where(np.arange(5) == 1, 0.4, 0.8)
    given_ = np.repeat([1, 2, 3, 4], [40, 80, 80, 80])  # of equally many each
    drawn = labels_like(np.zeros(280, dtype=int), given_, CANARIES, found, CANARIES, draws=8, seed=0)
    assert np.bincount(drawn[:, CANARIES == 0].ravel(), minlength=5)[1:] / 8000 == pytest.approx(0.25, abs=0.03)


def test_wrong_labels_that_are_never_found_are_as_frequent_as_the_others():
    found = np.broadcast_to(np.arange(5) != 4, (5000, 5))
    given_ = np.repeat([1, 2, 3], 100)
    drawn = labels_like(np.zeros(300, dtype=int), given_, CANARIES, found, CANARIES, draws=8, seed=0)
    assert np.bincount(drawn[:, CANARIES == 0].ravel(), minlength=5)[1:] / 8000 == pytest.approx(0.25, abs=0.03)
