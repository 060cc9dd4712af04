"""PrivacyPlan: settings, the default delta, and what a plan foretells."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from robust_train.privacy.accounting import epsilon
from robust_train.privacy.plan import PrivacyPlan, default_delta

SETTINGS = {"noise_multiplier": 1.8, "sample_rate": 0.04, "dataset_size": 50_000, "steps": 1000}


def plan(**changes) -> PrivacyPlan:
    return PrivacyPlan(**{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"noise_multiplier": -1.0}, "plan.noise_multiplier must be a number >= 0, got -1.0"),
        ({"noise_multiplier": math.nan}, "plan.noise_multiplier"),
        ({"noise_multiplier": math.inf}, "plan.noise_multiplier"),
        ({"sample_rate": 0.0}, r"plan.sample_rate must be in \(0, 1\], got 0.0"),
        ({"sample_rate": 1.5}, "plan.sample_rate"),
        ({"dataset_size": 0}, "plan.dataset_size must be a whole number >= 1, got 0"),
        ({"dataset_size": 10.5}, "plan.dataset_size"),
        ({"steps": 0}, "plan.steps must be a whole number >= 1, got 0"),
        ({"delta": 0.0}, r"plan.delta must be in \(0, 1\), got 0.0"),
        ({"delta": 1.0}, "plan.delta"),
        ({"delta": math.nan}, "plan.delta"),
        ({"delta": 1 / 50_000}, "plan.delta=2e-05 promises nothing for 50000 examples.* below .*2e-05"),
        ({"max_grad_norm": 0.0}, "plan.max_grad_norm must be > 0, got 0.0"),
        ({"accountant": "moments"}, "plan.accountant must be one of prv, rdp, gdp, got 'moments'"),
        ({"noise_schedule": ()}, "plan.noise_schedule must be factors > 0"),
        ({"noise_schedule": (1.0, 0.0)}, "plan.noise_schedule"),
    ],
)
def test_bad_settings_are_named(bad, says):
    with pytest.raises(ValueError, match=says):
        plan(**bad)


@pytest.mark.parametrize("size", [2, 100, 60_000, 10**9])
def test_the_default_delta_promises_something(size):
    assert 0 < default_delta(size) < 1 / size
    assert plan(dataset_size=size).delta == default_delta(size)


def test_a_plan_foretells_what_its_steps_cost():
    p = plan(noise_schedule=[1.2, 1.0], accountant="rdp", delta=1e-6)
    assert p.noise_schedule == (1.2, 1.0)
    assert p.segments(0, 1000) == [(1.8 * 1.2, 0.04, 500), (1.8, 0.04, 500)]
    assert [p.noise_multiplier_at(i) for i in (0, 499, 500, 5000)] == [1.8 * 1.2] * 2 + [1.8] * 2
    assert p.epsilon() == epsilon(p.segments(0, 1000), 1e-6, "rdp")
    assert p.epsilon(steps=10) == epsilon([(1.8 * 1.2, 0.04, 10)], 1e-6, "rdp")
    assert p.epsilon(steps=10, spent=[(1.0, 0.1, 5)]) > p.epsilon(steps=10)
    assert p.epsilon(steps=0) == 0
    assert p.expected_batch_size == 2000
    assert plan(max_grad_norm=0.5).noise_of_mean == pytest.approx(1.8 * 0.5 / 2000)
    assert plan(noise_multiplier=0.0).epsilon() == math.inf


def test_max_steps_counts_on_from_where_the_plan_is():
    p = plan(noise_schedule=(1.2, 1.0), accountant="rdp")
    whole = p.max_steps(2.0)
    assert p.epsilon(whole) <= 2.0 < p.epsilon(whole + 1)
    assert p.max_steps(2.0, spent=p.segments(0, 100), begun=100) == whole - 100


def test_a_calibrated_plan_keeps_to_its_budget():
    p = PrivacyPlan.calibrated(2.0, sample_rate=0.04, dataset_size=50_000, steps=300, noise_schedule=(1.2, 1.0))
    assert 0.999 * 2 <= p.epsilon() <= 2.0
    spent = [(1.8, 0.04, 100)]
    rest = PrivacyPlan.calibrated(2.0, spent=spent, sample_rate=0.04, dataset_size=50_000, steps=300, accountant="rdp")
    assert rest.epsilon() < rest.epsilon(spent=spent) <= 2.0


def test_trade_offs_point_the_right_way():
    rows = plan(accountant="rdp").trade_offs()
    noise = {change: p.noise_multiplier for change, _, p in rows}
    assert rows[0][0] == "this plan"
    assert noise["epsilon 1"] > noise["epsilon 2"] > noise["epsilon 8"]
    assert noise["batch / 2"] < noise["this plan"] < noise["batch x 2"]
    assert noise["epochs / 2"] < noise["this plan"] < noise["epochs x 2"]
    for _, target, p in rows[1:]:
        assert p.epsilon() <= target
        assert (p.delta, p.max_grad_norm) == (rows[0][2].delta, rows[0][2].max_grad_norm)


def test_a_plan_survives_json():
    p = plan(noise_schedule=(1.2, 1.0), delta=1e-6)
    assert PrivacyPlan.from_dict(json.loads(json.dumps(p.to_dict()))) == p


def test_the_plan_is_a_public_name_that_needs_no_torch():
    code = "import sys; from robust_train import PrivacyPlan; assert PrivacyPlan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
