"""Both callbacks can be named on the command line of LightningCLI, of both Lightning packages."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("jsonargparse")
# Lightning calls what jsonargparse has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_callbacks_from_lightning_cli(package, monkeypatch, tmp_path):
    cli = pytest.importorskip(f"{package}.cli")
    demos = pytest.importorskip(f"{package}.demos.boring_classes")
    monkeypatch.chdir(tmp_path)
    words = [
        "--trainer.callbacks+=robust_train.AdversarialTraining",
        "--trainer.callbacks.attack=robust_train.PGD",
        "--trainer.callbacks.attack.steps=3",
        "--trainer.callbacks.threat=robust_train.Threat",
        "--trainer.callbacks.threat.eps=8/255",
        "--trainer.callbacks+=robust_train.RobustEvaluation",
        "--trainer.callbacks.attacks=robust_train.PGD",
        "--trainer.callbacks.threat=robust_train.Threat",
        "--trainer.callbacks.threat.eps=0.1",
        "--seed_everything=0",
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    made = cli.LightningCLI(demos.BoringModel, demos.BoringDataModule, run=False, save_config_callback=None)
    ours = [c for c in made.trainer.callbacks if type(c).__module__.startswith("robust_train")]
    training, evaluation = ours
    assert training.attack.steps == 3
    assert training.threat.eps == 8 / 255
    assert evaluation.threat.eps == 0.1
    assert next(iter(evaluation.attacks.values())).steps == 10


CONFIG = """
seed_everything: 0
trainer:
  logger: false
  accelerator: cpu
  callbacks:
    - class_path: robust_train.AdversarialTraining
      init_args:
        attack: {class_path: robust_train.PGD, init_args: {steps: 3}}
        threat: {class_path: robust_train.Threat, init_args: {eps: 8/255}}
    - class_path: robust_train.DPSGD
      init_args: {noise_multiplier: 1.0, sample_rate: 0.1}
    - class_path: robust_train.DataFilter
      init_args:
        filters: [{class_path: robust_train.poisoning.filters.aum.AUM}]
        policy: {class_path: robust_train.Policy, init_args: {max_drop: 0.1}}
    - class_path: robust_train.DataValidation
      init_args: {mode: quarantine}
"""


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_callbacks_from_a_class_path_in_a_yaml(package, monkeypatch, tmp_path):
    cli = pytest.importorskip(f"{package}.cli")
    demos = pytest.importorskip(f"{package}.demos.boring_classes")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])
    made = cli.LightningCLI(demos.BoringModel, demos.BoringDataModule, run=False, save_config_callback=None)
    training, private, filtering, validation = [
        c for c in made.trainer.callbacks if type(c).__module__.startswith("robust_train")
    ]
    assert (training.attack.steps, training.threat.eps) == (3, 8 / 255)
    assert private.settings()["noise_multiplier"] == 1.0
    assert list(filtering.filters) == ["aum"]
    assert filtering.policy.max_drop == 0.1
    assert validation.mode == "quarantine"
