"""What ``RobustEvaluation`` says after a test run: intervals, parts, flags, corruptions, shards, examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, make_trainer, portrait
from torch import Tensor, nn

from robust_train import PGD, Corruptions, RobustEvaluation, Threat, UniformNoise, evaluate

THREAT = Threat(eps=0.06)
ATTACKS = {"noise": UniformNoise(), "pgd": PGD(steps=4, random_start=False)}
FEW = Corruptions(["gaussian_noise", "contrast"], [1, 5])


class Trained(TupleBatch):
    """Half trained, as in test_robust_evaluation.py; behind its network whatever a test puts there."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        x, y = image_columns(60, seed=5)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        self.net = nn.Sequential(net, *after)


class Scaled(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class Noisy(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits + 0.2 * torch.randn_like(logits)


def measured(callback: RobustEvaluation, module=None, data=None, **settings) -> dict[str, float]:
    trainer = make_trainer(pl.Trainer, callback, **settings)
    data = loader(*image_columns(60, seed=1)) if data is None else data
    (found,) = trainer.test(Trained() if module is None else module, data, verbose=False)
    return found


def test_the_evaluation_equals_that_of_the_plain_module():
    callback = RobustEvaluation(ATTACKS, THREAT, corruptions=FEW)
    logged = measured(callback)
    found = callback.evaluation
    assert found is not None
    module = Trained()
    plain = evaluate(module, loader(*image_columns(60, seed=1)), THREAT, ATTACKS, corruptions=FEW)
    assert found.rates["robust_acc_pgd"] == plain.rates["robust_acc_pgd"]
    assert found.by_class.keys() == plain.by_class.keys()
    assert [flag.name for flag in found.flags] == [flag.name for flag in plain.flags]
    assert logged["test/robust_acc"] == pytest.approx(found.robust_acc)
    assert logged["test/corruption_acc"] == pytest.approx(found.corruption_acc)
    assert found.n == 60
    assert found.checked


@pytest.mark.parametrize(("fault", "name"), [(Scaled, "zero_gradients"), (nn.Softmax, "probability_outputs")])
def test_flags_are_found_through_the_users_step_and_said(fault, name, caplog):
    callback = RobustEvaluation(ATTACKS, THREAT)
    with caplog.at_level("INFO"):
        measured(callback, Trained(fault() if fault is Scaled else fault(1)))
    assert callback.evaluation is not None
    assert name in [flag.name for flag in callback.evaluation.flags]
    assert f"WARNING, {name}" in caplog.text
    quiet = RobustEvaluation(ATTACKS, THREAT, checks=False)
    measured(quiet, Trained(Scaled()))
    assert quiet.evaluation is not None
    assert not quiet.evaluation.checked
    assert not quiet.evaluation.flags


def test_a_step_in_training_mode_is_named():
    class Forgets(Trained):
        def on_test_start(self) -> None:
            self.net.train()

    callback = RobustEvaluation(ATTACKS, THREAT)
    measured(callback, Forgets())
    assert callback.evaluation is not None
    assert "train_mode" in [flag.name for flag in callback.evaluation.flags]


def test_a_model_that_draws_is_judged_by_several_draws():
    callback = RobustEvaluation(PGD(steps=2), THREAT, limit_batches=1)
    logged = measured(callback, Trained(Noisy()))
    found = callback.evaluation
    assert found is not None
    assert found.draws == 10
    assert "randomised_outputs" in [flag.name for flag in found.flags]
    assert logged["test/robust_acc"] == pytest.approx(found.robust_acc, abs=1e-6)
    assert found.rates["robust_acc"].interval == "hoeffding"
    asked = RobustEvaluation(PGD(steps=2), THREAT, limit_batches=1, draws=3)
    measured(asked, Trained(Noisy()))
    assert asked.evaluation is not None
    assert asked.evaluation.draws == 3


def test_groups_are_read_from_the_batch():
    x, y = image_columns(60, seed=1)
    site = torch.arange(60) // 20
    for asked, data in ((2, loader(x, y, site)), ("meta.site", loader(x, y, site, as_batch=_nested))):
        module = OfSites()
        callback = RobustEvaluation(ATTACKS, THREAT, groups=asked)
        measured(callback, module, data)
        assert callback.evaluation is not None
        assert {name: part["clean_acc"].n for name, part in callback.evaluation.by_group.items()} == dict.fromkeys(
            "012", 20
        )
    with pytest.raises(ValueError, match=r"robust_evaluation\.groups='where' names no part of the batch"):
        measured(RobustEvaluation(ATTACKS, THREAT, groups="where"))


class OfSites(Trained):
    def test_step(self, batch, batch_idx):
        self(batch["x"] if isinstance(batch, dict) else batch[0])


def _nested(x, y, site):
    return {"x": x, "y": y, "meta": {"site": site}}


class Breaks(Trained):
    limit = -1

    def on_test_batch_start(self, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == self.limit:
            raise RuntimeError("interrupted")


def test_a_test_that_was_interrupted_goes_on_and_refuses_other_weights(tmp_path, monkeypatch):
    def callback():
        return RobustEvaluation(ATTACKS, THREAT, shards=str(tmp_path), examples=10)

    def times():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    whole = RobustEvaluation(ATTACKS, THREAT, examples=10)
    expected = measured(whole, Breaks())
    with monkeypatch.context() as until:
        until.setattr(Breaks, "limit", 3)
        with pytest.raises(RuntimeError, match="interrupted"):
            measured(callback(), Breaks())
    done = times()
    assert 3 <= sum(name.startswith("shard-") for name in done) <= 4
    for _ in range(2):
        again = callback()
        assert measured(again, Breaks()) == expected
        assert again.evaluation == whole.evaluation
        assert again.adversarial_examples is not None
        assert whole.adversarial_examples is not None
        assert torch.equal(again.adversarial_examples.adversarial, whole.adversarial_examples.adversarial)
        assert len(again.adversarial_examples.inputs) == 10
        assert done.items() <= times().items()
        done = times()
    other = Breaks()
    with torch.no_grad():
        other.net[0][1].bias[0] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        measured(callback(), other)


def test_validation_and_training_are_as_they_were():
    """Nothing of this happens outside of test: not a call of the step more."""
    calls = []

    class Counting(Trained):
        def validation_step(self, batch, batch_idx):
            calls.append(len(batch[0]))
            return super().validation_step(batch, batch_idx)

    for asked in ({}, {"checks": False}):
        callback = RobustEvaluation(ATTACKS, THREAT, **asked)
        make_trainer(pl.Trainer, callback).validate(Counting(), loader(*image_columns(16)), verbose=False)
        assert callback.evaluation is None
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]


def test_the_module_is_as_before_and_tasks_without_classes_have_no_evaluation():
    module = Trained(nn.BatchNorm1d(3), nn.Dropout(0.5))
    before = portrait(module)
    measured(RobustEvaluation(ATTACKS, THREAT, corruptions=FEW, examples=5), module)
    assert_same(before, portrait(module))
    case = CASES["regression"]
    callback = RobustEvaluation(PGD(steps=2), case.ball(0.1))
    regression = case.module()
    regression.test_step = regression.validation_step
    logged = measured(callback, regression, case.data()["val_dataloaders"])
    assert "test/robust_loss" in logged
    assert callback.evaluation is None


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"groups": ""}, ValueError, "robust_evaluation.groups must be an index"),
        ({"checks": "no"}, ValueError, "robust_evaluation.checks must be true or false"),
        ({"draws": 0}, ValueError, "robust_evaluation.draws must be a whole number >= 1"),
        ({"examples": -1}, ValueError, "robust_evaluation.examples must be a whole number >= 0"),
        ({"shards": ""}, ValueError, "robust_evaluation.shards must be a name or path"),
        ({"corruptions": True}, TypeError, "robust_evaluation.corruptions must be Corruptions"),
    ],
)
def test_settings_that_cannot_be(asked, error, says):
    with pytest.raises(error, match=says):
        RobustEvaluation(ATTACKS, THREAT, **asked)


@pytest.mark.ddp
def test_two_processes_are_counted_together(tmp_path):
    script = Path(__file__).with_name("testing_script.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first["n"] == 60
    assert first["rates"]["robust_acc"]["value"] == pytest.approx(first["logged"])
    assert sum(part["clean_acc"]["n"] for part in first["by_class"].values()) == 60
