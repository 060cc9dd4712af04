"""Certificate: what it says, its file, and that it cannot be made to say less than its history."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

from robust_train.privacy import accounting
from robust_train.privacy.certificate import ASSUMPTIONS, Certificate
from robust_train.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan(noise_multiplier=1.1, sample_rate=0.01, dataset_size=50_000, steps=100, delta=1e-5)
HISTORY = [(1.1, 0.01, 100), (2.0, 0.02, 50)]


def certificate(plan=PLAN, history=HISTORY, **changes) -> Certificate:
    return Certificate.of(plan, history, **{"clipping": "flat", "engine": "hooks", **changes})


def edited(folder, **changes):
    path = folder / "edited.json"
    path.write_text(json.dumps({**certificate().to_dict(), **changes}))
    return path


def test_it_states_epsilon_and_how_it_came_about():
    c = certificate(target_epsilon=3.0, assumptions=["One more."])
    assert c.epsilon == accounting.epsilon(HISTORY, 1e-5)
    assert c.steps == 150
    assert c.assumptions == (*ASSUMPTIONS, "One more.")
    state = c.to_dict()
    assert state["schema"] == "robust-train/privacy-certificate"
    assert state["epsilon_is"] == "upper bound"
    assert state["noise_multipliers"] == [1.1, 2.0]
    assert state["expected_batch_size"] == 500
    assert state["history"] == [[1.1, 0.01, 100], [2.0, 0.02, 50]]
    assert state["created"].endswith("+00:00")
    assert "Poisson" in state["mechanism"]
    assert "zero-out" in state["neighbours"]
    assert {"python", "opacus", "torch"} <= set(state["versions"])
    assert any("Hyper-parameter" in line for line in state["not_covered"])


def test_an_approximation_is_called_one():
    c = certificate(replace(PLAN, accountant="gdp"))
    assert c.to_dict()["epsilon_is"] == "approximation"
    assert any("not a bound" in line for line in c.assumptions)


def test_the_file_holds_the_same_certificate(tmp_path):
    path = tmp_path / "c.json"
    c = certificate(target_epsilon=3.0)
    path.write_text("something older")
    c.write(path)
    assert Certificate.read(path) == c
    assert Certificate.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    assert os.listdir(tmp_path) == ["c.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    path.write_text("the old one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        certificate().write(path)
    assert path.read_text() == "the old one"
    assert os.listdir(tmp_path) == ["c.json"]


@pytest.mark.parametrize(
    ("history", "void", "says"),
    [
        (HISTORY, ["the noise was drawn with unsafe_seed"], "unsafe_seed"),
        ([*HISTORY, (0.0, 0.01, 1)], [], "a step had no noise"),
        ([(0.05, 0.3, 3)], [], 'use accountant="rdp"'),
    ],
)
def test_a_void_certificate_has_reasons_and_no_epsilon(history, void, says, tmp_path):
    c = certificate(history=history, void=void)
    assert c.epsilon is None
    assert says in "; ".join(c.void)
    assert c.verify().right
    assert says in c.verify().says
    c.write(tmp_path / "c.json")
    assert "Infinity" not in (tmp_path / "c.json").read_text()
    assert Certificate.read(tmp_path / "c.json") == c


def test_epsilon_and_void_exclude_each_other():
    for bad in ({"epsilon": None}, {"void": ("no",)}, {"epsilon": math.inf}, {"epsilon": -1.0}):
        with pytest.raises(ValueError, match="epsilon"):
            replace(certificate(), **bad)


def test_verify_recomputes_epsilon():
    c = certificate(target_epsilon=3.0)
    assert c.epsilon is not None
    assert c.verify().right
    assert c.verify().epsilon == c.epsilon
    lower = replace(c, epsilon=0.999 * c.epsilon).verify()
    assert not lower.right
    assert "its history costs" in lower.says
    higher = replace(c, epsilon=1.1 * c.epsilon).verify()
    assert higher.right
    assert "more than necessary" in higher.says
    assert not replace(c, history=[(1.1, 0.01, 1000)]).verify().right
    assert not replace(c, history=[*HISTORY, (0.0, 0.01, 1)]).verify().right
    assert not replace(c, history=[(0.05, 0.3, 3)]).verify().right
    assert "exceeds its target" in replace(c, target_epsilon=0.01).verify().says
    assert "promises nothing" in replace(c, delta=0.01).verify().says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": "something/else"}, "no privacy certificate"),
        ({"version": 99}, "version 99"),
        ({"epsilon": "1.0"}, "epsilon is not of the right kind"),
        ({"delta": None}, "delta is not of the right kind"),
        ({"delta": 2.0}, "delta 2.0 is not in"),
        ({"dataset_size": True}, "dataset_size is not of the right kind"),
        ({"accountant": "moments"}, "accountant 'moments'"),
        ({"history": [[1.1, 0.01]]}, "a segment of the history"),
        ({"history": [[1.1, 0.01, 0.5]]}, "a segment of the history"),
        ({"history": [["a", "b", "c"]]}, "cannot be read"),
        ({"history": [5]}, "cannot be read"),
        ({"void": [1]}, "void must hold text"),
        ({"steps": 1}, "contradicts itself: steps is 1, not 150"),
        ({"epsilon_is": "proof"}, "contradicts itself: epsilon_is"),
        ({"noise_multipliers": [5.0]}, "contradicts itself: noise_multipliers"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        Certificate.read(edited(tmp_path, **changes))
    assert "edited.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"epsilon": NaN}', "\x00", '{"schema": "robust-train/privacy-certificate"}']
)
def test_what_is_no_certificate_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match="c.json"):
        Certificate.read(tmp_path / "c.json")


def test_missing_files_and_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        Certificate.read(tmp_path / "none.json")
    state = certificate().to_dict()
    del state["history"], state["engine"]
    with pytest.raises(ValueError, match="lacks history, engine"):
        Certificate.from_dict(state)
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"c\.json"):
        Certificate.read(tmp_path / "c.json")
