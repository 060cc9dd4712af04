"""What steps cost: against closed forms, against another library, and the properties that planning relies on."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import norm

from robust_train.privacy import _opacus
from robust_train.privacy.accounting import (
    ACCOUNTANTS,
    AccountingError,
    calibrate,
    epsilon,
    max_steps,
    merge,
    prefix,
    segments,
)

DIGITS = [(1.1, 0.01, 1000)]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Of the Gaussian mechanism, exactly (Balle & Wang, 2018, theorem 8): DP-SGD with a sample rate of 1."""

    def excess(value: float) -> float:
        return norm.cdf(mu / 2 - value / mu) - math.exp(value + log_ndtr(-mu / 2 - value / mu)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0, 700, xtol=1e-12))


def google_epsilon(history, delta: float, interval: float) -> float:
    """Upper bound by privacy-loss distributions, another method in another library."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    for noise, rate, steps in history:
        part = pld.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=interval, use_connect_dots=True
        ).self_compose(steps)
        total = part if total is None else total.compose(part)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


def plans(count: int, seed: int) -> list[tuple[float, float, int, float]]:
    """Random plans whose epsilon is of practical size."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        noise, rate = np.exp(rng.uniform(np.log([0.5, 1e-4]), np.log([12, 0.3])))
        steps, delta = int(np.exp(rng.uniform(0, np.log(20_000)))), float(rng.choice([1e-3, 1e-5, 1e-6, 1e-7]))
        if 0.1 < epsilon([(noise, rate, steps)], delta, "rdp") < 20:
            found.append((float(noise), float(rate), steps, delta))
    return found


def check_against_google(noise: float, rate: float, steps: int, delta: float) -> None:
    ours = epsilon([(noise, rate, steps)], delta)
    theirs = google_epsilon([(noise, rate, steps)], delta, interval=min(1e-4, 2e-4 * ours))
    assert theirs <= ours <= theirs + max(0.02 * theirs, 0.012)


@pytest.mark.parametrize("plan", plans(12, seed=0))
def test_prv_agrees_with_another_library(plan):
    check_against_google(*plan)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plan", plans(200, seed=1))
def test_prv_agrees_with_another_library_on_200_plans(plan):
    check_against_google(*plan)


@pytest.mark.parametrize("pieces", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_prv_of_unlike_segments_agrees_with_another_library(pieces):
    rng = np.random.default_rng(pieces)
    steps = 600 if pieces == 2 else 6000
    history = [
        (
            float(rng.uniform(0.8, 4)),
            float(np.exp(rng.uniform(np.log(1e-4), np.log(1e-2)))),
            int(rng.integers(1, steps)),
        )
        for _ in range(pieces)
    ]
    theirs = google_epsilon(history, 1e-5, 5e-5)
    assert theirs <= epsilon(history, 1e-5) <= theirs + max(0.02 * theirs, 0.012)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-10])
@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_full_batches_agree_with_the_closed_form(steps, mu, delta):
    exact = gaussian_epsilon(mu, delta)
    history = [(math.sqrt(steps) / mu, 1.0, steps)]
    assert exact <= epsilon(history, delta) <= exact + max(0.013 * exact, 0.0035)
    assert exact <= epsilon(history, delta, "rdp")


@pytest.mark.parametrize(("steps", "mu"), [(20_000, 0.3), (20_000, 1.0), (28_000, 2.0)])
def test_rounding_never_makes_epsilon_too_small(steps, mu):
    exact = gaussian_epsilon(mu, 1e-10)
    assert exact <= epsilon([(math.sqrt(steps) / mu, 1.0, steps)], 1e-10) <= 1.03 * exact


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_the_edges(accountant):
    assert epsilon([], 1e-5, accountant) == 0.0
    assert epsilon([(0.0, 0.1, 0)], 1e-5, accountant) == 0.0
    assert epsilon([(0.0, 0.1, 1)], 1e-5, accountant) == math.inf
    assert epsilon([*DIGITS, (0.0, 0.1, 1)], 1e-5, accountant) == math.inf
    assert epsilon([(1e6, 1e-6, 1)], 1e-3, accountant) < 0.01


@pytest.mark.parametrize(
    ("history", "delta", "accountant", "says"),
    [
        (DIGITS, 0.0, "prv", "delta must be in"),
        (DIGITS, 1.0, "prv", "delta must be in"),
        (DIGITS, math.nan, "prv", "delta must be in"),
        (DIGITS, 1e-5, "moments", "accountant must be one of prv, rdp, gdp"),
        ([(-1.0, 0.1, 1)], 1e-5, "prv", "a segment of the history must be"),
        ([(math.nan, 0.1, 1)], 1e-5, "prv", "a segment of the history must be"),
        ([(math.inf, 0.1, 1)], 1e-5, "prv", "a segment of the history must be"),
        ([(1.0, 0.0, 1)], 1e-5, "prv", "a segment of the history must be"),
        ([(1.0, 1.1, 1)], 1e-5, "prv", "a segment of the history must be"),
        ([(1.0, 0.1, -1)], 1e-5, "prv", "a segment of the history must be"),
        ([(1.0, 0.1, 1.5)], 1e-5, "prv", "a segment of the history must be"),
        ([(1.0, 0.1)], 1e-5, "prv", "a segment of the history must be"),
    ],
)
def test_bad_arguments_are_named(history, delta, accountant, says):
    with pytest.raises(ValueError, match=says):
        epsilon(history, delta, accountant)


@pytest.mark.parametrize(
    ("history", "delta", "accountant", "says"),
    [
        ([(0.05, 0.3, 3)], 1e-5, "prv", 'the result is inf.*use accountant="rdp"'),
        ([(1.0, 0.01, 100_000)], 1e-10, "prv", 'rounding.*use accountant="rdp"'),
        ([(1.0, 0.01, 10**8)], 1e-5, "prv", 'grid.*use accountant="rdp"'),
        ([(0.3, 0.9, 100)], 1e-5, "gdp", 'use accountant="rdp"'),
        ([(0.01, 0.9, 100)], 1e-5, "gdp", 'use accountant="rdp"'),
    ],
)
def test_where_an_accountant_ends_it_says_what_to_do(history, delta, accountant, says):
    with pytest.raises(AccountingError, match=says):
        epsilon(history, delta, accountant)
    assert 0 < epsilon(history, delta, "rdp") < math.inf


def test_a_failure_inside_opacus_is_one_clear_error(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Discrete mean differs\nsignificantly")

    monkeypatch.setattr(_opacus.accountants().PRVAccountant, "get_epsilon", fail)
    with pytest.raises(AccountingError, match=r'Discrete mean differs significantly.*use accountant="rdp"'):
        epsilon([(1.2345, 0.01, 10)], 1e-5)


def test_a_prv_bound_above_the_looser_one_is_not_believed(monkeypatch):
    monkeypatch.setattr(_opacus, "prv_epsilon", lambda *_: 50.0)
    with pytest.raises(AccountingError, match="above the looser bound"):
        epsilon([(1.2346, 0.01, 10)], 1e-5)


def test_the_three_accountants_differ_as_they_should():
    prv, rdp, gdp = (epsilon(DIGITS, 1e-5, name) for name in ("prv", "rdp", "gdp"))
    assert gdp < prv < rdp < 1.2 * prv
    accountant = _opacus.accountants().PRVAccountant()
    accountant.history = list(DIGITS)
    assert prv == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-4)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_the_order_of_segments_and_how_they_are_cut_do_not_matter(accountant):
    whole = [(1.2, 0.02, 300), (0.9, 0.01, 100)]
    cut = [(0.9, 0.01, 60), (1.2, 0.02, 299), (0.9, 0.01, 40), (1.2, 0.02, 1), (3.0, 0.5, 0)]
    assert merge(cut) == tuple(sorted(whole))
    assert epsilon(whole, 1e-5, accountant) == epsilon(cut, 1e-5, accountant)


# --- properties -----------------------------------------------------------------------------------------------------

NOISE, RATE = st.floats(0.7, 8.0), st.sampled_from((0.001, 0.01, 0.05, 0.4))
SLACK = 1e-4  # numerics: far below the 0.002 that PRV's error is at least


@settings(max_examples=8, deadline=None)
@given(noise=NOISE, rate=RATE, steps=st.integers(1, 150), more=st.floats(1.0, 2.0))
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(noise, rate, steps, more):
    before = epsilon([(noise, rate, steps)], 1e-5)
    assume(before < 50)
    assert 0 <= before <= epsilon([(noise, rate, steps)], 1e-5, "rdp") + 0.01
    assert epsilon([(noise, rate, math.ceil(steps * more))], 1e-5) >= before - SLACK
    assert epsilon([(noise, min(1.0, rate * more), steps)], 1e-5) >= before - SLACK
    assert epsilon([(noise * more, rate, steps)], 1e-5) <= before + SLACK


@settings(max_examples=60, deadline=None)
@given(
    factors=st.lists(st.floats(0.2, 3.0), min_size=1, max_size=5),
    planned=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 60), min_size=2, max_size=4).map(sorted),
)
def test_a_schedule_may_be_cut_anywhere(factors, planned, cuts):
    whole = segments(2.0, 0.1, cuts[0], cuts[-1], factors, planned)
    parts = [s for a, b in zip(cuts, cuts[1:], strict=False) for s in segments(2.0, 0.1, a, b, factors, planned)]
    assert sum(n for _, _, n in whole) == cuts[-1] - cuts[0]
    assert merge(whole) == merge(parts)
    assert all(n > 0 for _, _, n in whole)
    assert len(whole) <= len(factors)


def test_a_schedule_has_equal_parts_and_its_last_factor_holds():
    assert segments(2.0, 0.1, 0, 9, (1.5, 1.0, 0.5), 9) == [(3.0, 0.1, 3), (2.0, 0.1, 3), (1.0, 0.1, 3)]
    assert segments(2.0, 0.1, 4, 20, (1.5, 1.0, 0.5), 9) == [(2.0, 0.1, 2), (1.0, 0.1, 14)]
    assert segments(2.0, 0.1, 3, 3) == []
    assert prefix([(3.0, 0.1, 3), (2.0, 0.1, 3)], 4) == [(3.0, 0.1, 3), (2.0, 0.1, 1)]
    for bad in ({"noise_schedule": ()}, {"noise_schedule": (0.0,)}, {"noise_schedule": (1.0, 2.0)}):
        with pytest.raises(ValueError, match="noise_schedule"):
            segments(1.0, 0.1, 0, 5, **bad)
    with pytest.raises(ValueError, match="steps must run"):
        segments(1.0, 0.1, 5, 4)


# --- planning -------------------------------------------------------------------------------------------------------


def check_calibrated(target, rate, steps, accountant, spent=(), schedule=(1.0,), delta=1e-5):
    noise = calibrate(target, delta, rate, steps, accountant, spent, schedule)
    run = segments(noise, rate, 0, steps, schedule, steps)
    assert 0.999 * target <= epsilon([*spent, *run], delta, accountant) <= target
    return noise


@settings(max_examples=25, deadline=None)
@given(
    target=st.floats(0.1, 30.0),
    rate=st.sampled_from((0.002, 0.03, 0.3, 1.0)),
    steps=st.integers(1, 3000),
    accountant=st.sampled_from(("rdp", "gdp")),
    schedule=st.sampled_from(((1.0,), (1.2, 1.0, 0.8))),
    spent=st.sampled_from(((), ((5.0, 0.001, 100),))),
)
def test_calibrated_noise_keeps_to_the_budget_and_wastes_none(target, rate, steps, accountant, schedule, spent):
    assume(epsilon(spent, 1e-5, accountant) < 0.9 * target)
    check_calibrated(target, rate, steps, accountant, spent, schedule)


@pytest.mark.parametrize(
    ("target", "rate", "steps", "spent", "schedule"),
    [
        (3.0, 2048 / 60000, 1160, (), (1.0,)),
        (3.0, 2048 / 60000, 1160, ((1.8, 2048 / 60000, 500),), (1.0,)),
        (8.0, 0.05, 400, (), (1.2, 1.0, 0.8)),
        (0.1, 0.01, 50, (), (1.0,)),
        (100.0, 0.5, 20, (), (1.0,)),
    ],
)
def test_noise_calibrated_by_prv_keeps_to_the_budget_and_wastes_none(target, rate, steps, spent, schedule):
    check_calibrated(target, rate, steps, "prv", spent, schedule)


def test_calibration_takes_few_calls(monkeypatch):
    calls, prv = [], _opacus.prv_epsilon
    monkeypatch.setattr(_opacus, "prv_epsilon", lambda *args: calls.append(args) or prv(*args))
    calibrate(2.9, 1e-5, 0.0331, 1000)
    assert len(calls) <= 5
    calls.clear()
    max_steps(2.9, 1.71, 0.0331, 1e-5)
    assert len(calls) <= 8


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_a_budget_that_cannot_be_met_is_refused(accountant):
    with pytest.raises(ValueError, match="spent already"):
        calibrate(1.0, 1e-5, 0.01, 10, accountant, DIGITS)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="target_epsilon must be > 0"):
            calibrate(bad, 1e-5, 0.01, 10, accountant)
        with pytest.raises(ValueError, match="target_epsilon must be > 0"):
            max_steps(bad, 1.0, 0.01, 1e-5, accountant)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        calibrate(1.0, 1e-5, 0.01, 0, accountant)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_budget_below_what_the_accountant_resolves_is_refused(accountant):
    with pytest.raises(ValueError, match="cannot be reached"):
        calibrate(1e-4, 1e-5, 0.01, 10, accountant)


def check_max_steps(target, noise, rate, accountant, spent=(), schedule=(1.0,), planned=None, delta=1e-5):
    def cost(n):
        return epsilon([*spent, *segments(noise, rate, 0, n, schedule, planned)], delta, accountant)

    n = max_steps(target, noise, rate, delta, accountant, spent, noise_schedule=schedule, planned_steps=planned)
    assert cost(n) <= target or n == 0
    assert cost(n + 1) > target
    return n


@settings(max_examples=40, deadline=None)
@given(
    target=st.floats(0.2, 20.0),
    noise=st.floats(0.7, 3.0),
    rate=st.sampled_from((0.01, 0.1, 1.0)),
    accountant=st.sampled_from(("rdp", "gdp")),
    schedule=st.sampled_from(((1.0,), (1.5, 1.0, 0.7))),
)
def test_max_steps_is_exact(target, noise, rate, accountant, schedule):
    check_max_steps(target, noise, rate, accountant, schedule=schedule, planned=100)


@pytest.mark.parametrize(
    ("target", "noise", "rate", "spent", "schedule"),
    [
        (3.0, 1.8, 2048 / 60000, (), (1.0,)),
        (3.0, 1.8, 2048 / 60000, ((1.5, 0.02, 500),), (1.0,)),
        (1.0, 1.1, 0.01, (), (2.0, 1.0, 0.5)),
        (4.0, 1.1, 1.0, (), (1.0,)),
        (30.0, 0.6, 0.2, (), (1.0,)),
    ],
)
def test_max_steps_is_exact_with_prv(target, noise, rate, spent, schedule):
    check_max_steps(target, noise, rate, "prv", spent, schedule, planned=300)


def test_max_steps_goes_on_where_a_plan_was_left():
    settings_ = {"noise_schedule": (1.5, 1.0), "planned_steps": 400}
    whole = max_steps(2.0, 1.2, 0.02, 1e-5, "rdp", **settings_)
    spent = segments(1.2, 0.02, 0, 150, (1.5, 1.0), 400)
    assert max_steps(2.0, 1.2, 0.02, 1e-5, "rdp", spent, from_step=150, **settings_) == whole - 150


def test_max_steps_where_nothing_fits_or_everything_does():
    assert max_steps(1.0, 1.1, 0.01, 1e-5, "prv", DIGITS) == 0
    assert max_steps(0.5, 0.6, 1.0, 1e-5) == 0
    assert max_steps(3.0, 0.0, 0.01, 1e-5, "rdp") == 0
    assert max_steps(3.0, 1e5, 1e-6, 1e-5, "rdp") == 1_000_000


# --- without torch --------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_accounting_does_without_torch_and_leaves_opacus_alone():
    out = run(
        "import sys\n"
        "from robust_train.privacy.accounting import epsilon\n"
        "before = [epsilon([(1.1, 0.01, 100)], 1e-5, a) for a in ('prv', 'rdp', 'gdp')]\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in ('torch', 'opacus')))\n"
        "import opacus\n"
        "from opacus.optimizers import DPOptimizer\n"
        "from opacus.accountants import PRVAccountant\n"
        "import torch\n"
        "print(hasattr(opacus, 'PrivacyEngine'), issubclass(DPOptimizer, torch.optim.Optimizer))\n"
        "print(before == [epsilon([(1.1, 0.01, 100)], 1e-5, a) for a in ('prv', 'rdp', 'gdp')])\n"
        "print(opacus.PrivacyEngine(accountant='prv').accountant.__class__ is PRVAccountant)\n"
    )
    assert out.splitlines() == ["[]", "True True", "True", "True"]


def test_accounting_uses_the_opacus_that_is_there():
    out = run(
        "import opacus, opacus.accountants\n"
        "from robust_train.privacy import _opacus\n"
        "from robust_train.privacy.accounting import epsilon\n"
        "print(epsilon([(1.1, 0.01, 100)], 1e-5) > 0, _opacus.accountants() is opacus.accountants)\n"
    )
    assert out.split() == ["True", "True"]
