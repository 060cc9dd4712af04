"""Membership inference: scores, areas, rates and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from robust_train.intervals import clopper_pearson
from robust_train.privacy.attacks.lira_offline import LiRAOffline
from robust_train.privacy.attacks.lira_online import LiRAOnline
from robust_train.privacy.attacks.loss_threshold import LossThreshold
from robust_train.privacy.attacks.rmia import RMIA
from robust_train.privacy.membership import Signals, halves, measure, scaled, tpr_at_fpr
from robust_train.privacy.roc import auc


def signals(n: int = 60, references: int = 8, seed: int = 0) -> tuple[Signals, np.ndarray]:
    """Examples of different difficulty; a model's losses are smaller on what it was trained on."""
    draw = np.random.default_rng(seed)
    trained_on = np.concatenate([halves(n, 1, seed + 1), halves(n, references, seed)])
    difficulty = draw.normal(size=n)
    losses = np.log1p(np.exp(difficulty + 0.5 * draw.normal(size=trained_on.shape) - 1.5 * trained_on))
    return Signals(losses[0], losses[1:], trained_on[1:]), trained_on[0]


def phi(loss: float) -> float:
    p = math.exp(-loss)
    return math.log(p / (1 - p))


# --- attacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_example", [False, True])
def test_lira_agrees_with_the_papers_formulas_written_out(per_example):
    found, _ = signals(references=12)
    n, names = len(found.losses), {True: "example", False: "global"}
    kinds = found.trained_on

    def column(kind: bool, i: int) -> list[float]:
        return [phi(x) for x in found.references[kinds[:, i] == kind, i]]

    kept = {kind: [column(kind, i) for i in range(n)] for kind in (True, False)}
    pooled = {
        kind: math.sqrt(sum((v - np.mean(c)) ** 2 for c in lists for v in c) / sum(len(c) - 1 for c in lists))
        for kind, lists in kept.items()
    }

    def deviation(kind: bool, i: int) -> float:
        return float(np.std(kept[kind][i], ddof=1)) if per_example else pooled[kind]

    online, offline = [], []
    for i in range(n):
        x = phi(found.losses[i])
        inside = stats.norm(np.mean(kept[True][i]), deviation(True, i))
        outside = stats.norm(np.mean(kept[False][i]), deviation(False, i))
        online.append(math.log(inside.pdf(x)) - math.log(outside.pdf(x)))
        offline.append(math.log(1 - outside.sf(x)))
    variance = names[per_example]
    np.testing.assert_allclose(LiRAOnline(variance=variance)(found), online, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(LiRAOffline(variance=variance)(found), offline, rtol=1e-6, atol=1e-9)


def test_rmia_ranks_as_the_papers_pairwise_score_does():
    found, _ = signals(references=4)
    draw = np.random.default_rng(1)
    points = Signals(draw.exponential(size=40), draw.exponential(size=(4, 40)), np.zeros((4, 40), dtype=bool))

    def ratio(s: Signals, i: int) -> float:
        p = np.exp(-s.references[:, i])
        ins, outs = p[s.trained_on[:, i]], p[~s.trained_on[:, i]]
        inside = np.mean(ins) if len(ins) else 0.3 * np.mean(outs) + 0.7
        return float(np.exp(-s.losses[i]) / ((inside + np.mean(outs)) / 2))

    at_points = [ratio(points, j) for j in range(40)]
    ours = RMIA()(found)
    for gamma in (1.0, 2.0):
        share = [np.mean([ratio(found, i) / z >= gamma for z in at_points]) for i in range(len(ours))]
        order = np.argsort(ours)
        assert (np.diff(np.array(share)[order]) >= 0).all()
        assert len(set(share)) > 5


def test_references_tell_more_than_the_loss_alone():
    found, members = signals(n=2000, references=4)
    areas = {type(a).__name__: measure(a(found), members).auc for a in (LossThreshold(), RMIA(), LiRAOnline())}
    assert areas["LossThreshold"] > 0.6
    assert areas["RMIA"] > areas["LossThreshold"] + 0.05
    assert areas["LiRAOnline"] > areas["LossThreshold"] + 0.05


def test_one_reference_scores_the_half_that_it_was_not_trained_on():
    found, members = signals(n=100, references=1)
    scores = RMIA()(found)
    assert (np.isnan(scores) == found.trained_on[0]).all()
    leakage = measure(scores, members)
    assert leakage.members + leakage.others == (~found.trained_on).sum()


def test_losses_below_zero_are_taken_as_they_are():
    assert scaled(np.array([-3.0, 1.0]), likelihoods=False).tolist() == [3.0, -1.0]
    found, members = signals(references=4)
    shifted = Signals(found.losses - 5, found.references - 5, found.trained_on)
    assert measure(LiRAOffline()(shifted), members).auc > 0.6


def test_a_loss_of_zero_has_a_finite_score():
    found = Signals(np.zeros(4), np.zeros((4, 4)), halves(4, 4, 0))
    for attack in (LossThreshold(), RMIA(), LiRAOffline(), LiRAOnline()):
        assert np.isfinite(attack(found)).all()


@pytest.mark.parametrize("attack", [RMIA(), LiRAOffline(), LiRAOnline()])
def test_too_few_references_are_refused(attack):
    found, _ = signals(references=4)
    none = Signals(found.losses, found.references[:0], found.trained_on[:0])
    with pytest.raises(ValueError, match=f"{type(attack).__name__} needs at least {attack.references} reference"):
        attack(none)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMIA(offline_scale=1.5), r"rmia.offline_scale must be a number in \[0, 1\], got 1.5"),
        (lambda: LiRAOnline(variance="fixed"), "lira_online.variance must be auto, global or example, got 'fixed'"),
        (lambda: LiRAOffline(variance=3), "lira_offline.variance must be"),  # pyright: ignore[reportArgumentType]
        (lambda: Signals(np.ones(3), np.ones((1, 2)), np.ones((1, 2), dtype=bool)), "must be of shape"),
        (lambda: Signals(np.array([1.0, np.nan]), np.ones((0, 2)), np.ones((0, 2), dtype=bool)), "not finite"),
        (lambda: Signals(np.ones(2), np.ones((1, 2)), np.ones((1, 2))), "must be bool"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- measuring ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 30))
@settings(max_examples=50, deadline=None)
def test_the_area_is_scikit_learns_also_with_ties(seed, m, n):
    draw = np.random.default_rng(seed)
    members, others = draw.integers(0, 8, m) / 4 + 0.2, draw.integers(0, 8, n) / 4
    members = np.round(members * 4) / 4
    area, low, high = auc(members, others)
    expected = roc_auc_score(np.r_[np.ones(m), np.zeros(n)], np.r_[members, others])
    assert area == pytest.approx(expected)
    assert 0 <= low <= area <= high <= 1


def test_delongs_interval_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    truth, covered = stats.norm.cdf(0.5 / math.sqrt(2)), 0
    for _ in range(600):
        _, low, high = auc(draw.normal(0.5, 1, 80), draw.normal(0, 1, 120))
        covered += low <= truth <= high
    assert 0.92 <= covered / 600 <= 0.98


def test_perfect_separation_is_not_certainty():
    area, low, high = auc(np.ones(20), np.zeros(50))
    assert (area, high) == (1.0, 1.0)
    assert low == pytest.approx(0.025 ** (1 / 20))
    area, low, high = auc(np.zeros(20), np.ones(50))
    assert (area, low) == (0.0, 0.0)
    assert high == pytest.approx(1 - 0.025 ** (1 / 20))


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=60, deadline=None)
def test_no_more_non_members_pass_than_the_rate_allows(seed, n, fpr):
    draw = np.random.default_rng(seed)
    members, others = draw.integers(0, 40, 50) + 5.0, draw.integers(0, 40, n).astype(float)
    rate = tpr_at_fpr(members, others, fpr)
    if n < round(1 / fpr):
        assert rate is None
        return
    assert rate is not None
    fprs, tprs, _ = roc_curve(np.r_[np.ones(50), np.zeros(n)], np.r_[members, others], drop_intermediate=False)
    assert rate.value == pytest.approx(max(tprs[fprs <= fpr + 1e-9]))
    assert rate.low <= rate.value <= rate.high


def test_a_rate_that_too_few_non_members_could_show_is_not_given():
    found, members = signals(n=400)
    leakage = measure(LossThreshold()(found), members)
    assert leakage.tpr[0.001] is None
    assert leakage.tpr[0.01] is not None
    assert leakage.to_dict()["tpr"]["0.001"] is None


@given(st.integers(1, 200), st.data())
@settings(max_examples=40, deadline=None)
def test_clopper_pearson_is_the_inversion_of_the_binomial_test(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = clopper_pearson(successes, trials)
    if successes:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    else:
        assert low == 0
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025)
    else:
        assert high == 1


@given(st.integers(2, 100), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_example_is_in_half_of_the_training_sets(n, references, seed):
    trained_on = halves(n, references, seed)
    assert trained_on.shape == (references, n)
    assert (halves(n, references, seed) == trained_on).all()
    if references == 1:
        assert trained_on.sum() == n // 2
    else:
        assert set(trained_on.sum(0)) <= {references // 2, (references + 1) // 2}


def test_nobody_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one member and one non-member"):
        measure(np.arange(3.0), np.ones(3, dtype=bool))
