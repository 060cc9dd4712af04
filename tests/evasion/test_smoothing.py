"""Randomized smoothing: its certificates hold, with the confidence that they state."""

from __future__ import annotations

from math import inf
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binomtest

from robust_train import Smoothing, Threat
from robust_train.evasion.certified.smoothing import (
    Certificate,
    certified_at,
    gaussian_noise,
    lower_confidence_bound,
    noisy_counts,
)

PHI = NormalDist().cdf


def halfspace(threshold: float = 0.0):
    """Class 1 where the first entry is above ``threshold``: under noise the share of class 1 is known exactly."""

    def model(x):
        score = x.flatten(1)[:, 0] - threshold
        return torch.stack([-score, score], 1)

    return model


def at(distance: float) -> torch.Tensor:
    x = torch.zeros(1, 2, 2)
    x[0, 0, 0] = distance
    return x


def test_the_bound_is_the_exact_one_sided_interval():
    for k, n, alpha in ((990, 1000, 0.001), (1000, 1000, 0.001), (60, 100, 0.05), (0, 10, 0.01)):
        want = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        assert lower_confidence_bound(k, n, alpha) == pytest.approx(want, abs=1e-12)
    assert lower_confidence_bound(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000))


@pytest.mark.parametrize("distance", [0.05, 0.15, 0.3])
def test_statements_are_wrong_no_more_often_than_alpha(distance):
    """The halfspace's own radius is the distance itself: any larger one is a wrong statement."""
    smoothing, model, runs = Smoothing(sigma=0.25, n0=10, n=100, alpha=0.1, batch=128), halfspace(), 400
    found = [smoothing.certify(model, at(distance), seed=seed) for seed in range(runs)]
    wrong = sum(c.predicted == 0 or (c.predicted == 1 and c.radius > distance) for c in found)
    # 0.1 is the most that is allowed; more than this many in 400 has a probability below 1e-6
    assert binomtest(wrong, runs, 0.1, alternative="greater").pvalue > 1e-6
    shares = sum(c.share > PHI(distance / 0.25) for c in found if c.predicted == 1)
    assert binomtest(shares, runs, 0.1, alternative="greater").pvalue > 1e-6
    if distance > 0.1:
        assert sum(c.predicted == 1 for c in found) > runs / 2  # and it does say something


def test_at_the_boundary_it_abstains_all_but_alpha_of_the_time():
    smoothing = Smoothing(sigma=0.25, n0=10, n=200, alpha=0.05)
    found = [smoothing.certify(halfspace(), at(0.0), seed=seed) for seed in range(300)]
    spoke = sum(c.predicted is not None for c in found)
    assert binomtest(spoke, 300, 0.05, alternative="greater").pvalue > 1e-6
    assert all(c.radius == 0 for c in found if c.predicted is None)


def test_certificates_come_close_to_the_true_radius_with_many_draws():
    found = Smoothing(sigma=0.5, n=50_000, batch=8192).certify(halfspace(), at(0.4), seed=3)
    assert found.predicted == 1
    assert 0.37 < found.radius < 0.4


def test_the_largest_radius_is_what_unanimous_draws_give():
    smoothing = Smoothing(sigma=0.25, n=1000)
    found = smoothing.certify(halfspace(-99.0), at(0.0))
    assert found.radius == smoothing.largest_radius == pytest.approx(0.25 * NormalDist().inv_cdf(0.001**0.001))


def test_the_same_seed_gives_the_same_certificate_whatever_the_batch_and_what_is_drawn_elsewhere():
    x = at(0.2)
    found = []
    for batch in (1, 64, 100, 1000, 4096):
        torch.rand(7)
        found.append(Smoothing(n0=33, n=1000, batch=batch).certify(halfspace(), x, seed=5, row=2))
    assert len(set(found)) == 1
    before = torch.get_rng_state()
    other = Smoothing(n0=33, n=1000).certify(halfspace(), x, seed=6, row=2)
    another = Smoothing(n0=33, n=1000).certify(halfspace(), x, seed=5, row=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({found[0].share, other.share, another.share}) == 3


def test_no_more_rows_are_asked_at_once_than_the_batch_and_all_draws_count():
    sizes = []

    def model(x):
        sizes.append(len(x))
        return halfspace()(x)

    g = torch.Generator().manual_seed(0)
    counts = noisy_counts(model, at(0.0), Threat(), sigma=0.1, n=300, batch=128, generator=g)
    assert sizes == [128, 128, 44]
    assert int(counts.sum()) == 300


def test_noise_is_in_pixels_and_is_not_clipped():
    x = torch.zeros(2000, 1, 4, 4)
    noisy = gaussian_noise(x, 0.3, Threat(mean=0.5, std=0.1), torch.Generator().manual_seed(0))
    assert float(noisy.std()) == pytest.approx(3.0, rel=0.02)
    plain = gaussian_noise(x, 0.3, Threat(), torch.Generator().manual_seed(0))
    assert float(plain.std()) == pytest.approx(0.3, rel=0.02)
    assert float(plain.min()) < 0


def test_one_score_an_example_is_a_problem_of_two_classes():
    found = Smoothing(n=500).certify(lambda x: x.flatten(1)[:, :1], at(0.5))
    assert found.predicted == 1


def test_certified_accuracy_counts_what_is_right_strictly_within_the_radius():
    certificates = [Certificate(1, 0.5, 0.9), Certificate(None, 0.0, 0.4), Certificate(0, 0.5, 0.9)]
    assert certified_at(certificates, [1, 1, 1], 0.0) == [True, False, False]
    assert certified_at(certificates, [1, 1, 0], 0.5) == [False, False, False]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sigma": 0}, "smoothing.sigma must be > 0 and finite, got 0"),
        ({"sigma": inf}, "smoothing.sigma"),
        ({"n": 0}, "smoothing.n must be a whole number >= 1, got 0"),
        ({"n0": 1.5}, "smoothing.n0"),
        ({"batch": True}, "smoothing.batch"),
        ({"alpha": 0.5}, r"smoothing.alpha must be in \(0, 0.5\), got 0.5"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        Smoothing(**settings)
