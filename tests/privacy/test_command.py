"""``robust-train privacy``: what it prints, its errors, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from robust_train import cli
from robust_train.privacy.accounting import epsilon
from robust_train.privacy.certificate import Certificate
from robust_train.privacy.plan import PrivacyPlan

PLAN = ["--delta", "1e-5", "--n", "60000", "--batch", "2048", "--epochs", "40"]


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["robust-train", "privacy", *arguments])
    cli.main()


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """The one line that it says."""
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture
def certificate(tmp_path):
    plan = PrivacyPlan(noise_multiplier=1.1, sample_rate=0.01, dataset_size=50_000, steps=100)
    made = Certificate.of(plan, plan.segments(0, 100), clipping="flat", engine="hooks", target_epsilon=3.0)
    made.write(tmp_path / "c.json")
    return tmp_path / "c.json"


def test_a_plan_as_json(monkeypatch, capsys):
    command(monkeypatch, "plan", "--epsilon", "3", *PLAN, "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps_per_epoch"] == 30
    assert plan["steps"] == 1200
    assert plan["sample_rate"] == 2048 / 60000
    assert plan["expected_batch_size"] == 2048
    assert 2.997 <= plan["epsilon"] <= 3.0
    assert plan["epsilon"] == epsilon([(plan["noise_multiplier"], 2048 / 60000, 1200)], 1e-5)
    assert plan["noise_of_mean"] == pytest.approx(plan["noise_multiplier"] / 2048)


def test_a_plan_with_its_table(monkeypatch, capsys):
    command(monkeypatch, "plan", "--noise-multiplier", "1.9", *PLAN, "--accountant", "rdp", "--max-grad-norm", "0.1")
    out = capsys.readouterr().out
    assert "rdp (upper bound)" in out
    assert "1200 (30 an epoch)" in out
    for row in ("this plan", "epsilon 1", "epsilon 8", "batch / 2", "batch x 2", "epochs / 2", "epochs x 2"):
        assert f"\n{row}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_steps_and_parts_of_epochs(monkeypatch, capsys):
    for length, steps in ((["--steps", "7"], 7), (["--epochs", "0.1"], 3), (["--epochs", "1"], 30)):
        command(monkeypatch, "plan", "--noise-multiplier", "1", *PLAN[:-2], *length, "--json", "--accountant", "gdp")
        assert json.loads(capsys.readouterr().out)["steps"] == steps


def test_the_plot(monkeypatch, capsys, tmp_path):
    path = tmp_path / "epsilon.svg"
    command(monkeypatch, "plan", "--epsilon", "3", *PLAN, "--json", "--accountant", "rdp", "--plot", str(path))
    assert path.read_text().startswith("<svg")
    assert "budget: 3" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--epsilon", "-1", *PLAN], "target_epsilon must be > 0"),
        (["plan", "--epsilon", "3", *PLAN, "--delta", "0.1"], "plan.delta=0.1 promises nothing"),
        (["plan", "--epsilon", "3", "--noise-multiplier", "1", *PLAN], "not allowed with"),
        (["plan", *PLAN], "one of the arguments --epsilon --noise-multiplier is required"),
        (["plan", "--noise-multiplier", "0", *PLAN], "without noise there is no privacy"),
        (["plan", "--epsilon", "3", *PLAN, "--batch", "70000"], "--batch must lie between 1 and --n"),
        (["plan", "--epsilon", "3", *PLAN, "--epochs", "0"], "--epochs must be > 0"),
        (["plan", "--epsilon", "3", *PLAN, "--epochs", "nan"], "--epochs must be > 0"),
        (["plan", "--epsilon", "three", *PLAN], "invalid float value"),
        (["plan", "--epsilon", "1e-5", *PLAN], "cannot be reached"),
        (["plan", "--noise-multiplier", "0.01", *PLAN], 'use accountant="rdp"'),
        (["show", "none.json"], "none.json: No such file"),
        ([], "the following arguments are required"),
        (["destroy"], "invalid choice"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, arguments, says):
    assert says in refused(monkeypatch, capsys, *arguments)


def test_a_certificate_is_shown_and_checked(monkeypatch, capsys, certificate):
    command(monkeypatch, "show", str(certificate))
    out = capsys.readouterr().out
    for words in ("Poisson-subsampled Gaussian", "zero-out", "100 at noise 1.1", "Assumptions:", "Checked: holds"):
        assert words in out


def test_a_certificate_that_understates_is_found_out(monkeypatch, capsys, certificate):
    state = json.loads(certificate.read_text())
    certificate.write_text(json.dumps({**state, "epsilon": state["epsilon"] / 2}))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "show", str(certificate))
    assert stopped.value.code == 1
    assert "WRONG: states epsilon" in capsys.readouterr().out


def test_a_void_certificate_says_so(monkeypatch, capsys, certificate):
    state = json.loads(certificate.read_text())
    certificate.write_text(json.dumps({**state, "epsilon": None, "void": ["unsafe_seed was set"]}))
    command(monkeypatch, "show", str(certificate))
    out = capsys.readouterr().out
    assert "none: the certificate is void" in out
    assert "unsafe_seed was set" in out


def test_help_is_there(monkeypatch, capsys):
    for arguments in (["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, *arguments)
        assert stopped.value.code == 0
    assert "robust-train privacy plan --epsilon 3" in capsys.readouterr().out


def test_planning_needs_no_torch():
    code = (
        "import sys; from robust_train import cli\n"
        f"sys.argv = ['robust-train', 'privacy', 'plan', '--epsilon', '3', '--accountant', 'rdp', *{PLAN}]\n"
        "cli.main(); print(*(m for m in ('torch', 'pytorch_lightning', 'opacus') if m in sys.modules), 'end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "end"
