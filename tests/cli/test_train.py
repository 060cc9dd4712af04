"""The command line, run in this process on few batches of the embedded digits."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cli_kit import NEEDS, RECIPES, SMALL, result, run

from robust_train import cli
from robust_train.cli import judge


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(recipe, monkeypatch, tmp_path):
    pytest.importorskip("torchattacks")
    out = run(monkeypatch, tmp_path, f"recipe={recipe}", "trainer.fast_dev_run=true", *SMALL, *NEEDS.get(recipe, ()))
    assert set(json.loads((out / "result.json").read_text())["results"]) == {recipe}


def test_a_run_with_its_baseline_leaves_everything(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torchattacks")
    few = (
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=3",
        "trainer.log_every_n_steps=1",
        "judge.limit_batches=1",
        "judge.attacks.apgd.settings.steps=2",
    )
    out = run(monkeypatch, tmp_path, "recipe=pgd_at", "baseline=true", *SMALL, *few)
    result = json.loads((out / "result.json").read_text())
    assert set(result["results"]) == {"standard", "pgd_at"}
    for metrics in result["results"].values():
        assert (
            metrics["robust_acc"] <= min(metrics["robust_acc_pgd"], metrics["robust_acc_apgd"]) <= metrics["clean_acc"]
        )
        assert metrics["curve"][0] == [0.0, metrics["clean_acc"]]
    rows = list(csv.DictReader((out / "result.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["standard", "pgd_at"]
    ElementTree.parse(out / "figure.svg")  # well-formed  # noqa: S314
    said = capsys.readouterr().out
    assert "Test accuracy within the Linf ball of radius 0.2" in said
    assert "worst case" in said
    for name in ("standard", "pgd_at"):
        assert list((out / name / "checkpoints").glob("*.ckpt"))
        header = (out / name / "metrics.csv").read_text().split("\n")[0]
        assert ("train/adv_loss" in header) == (name == "pgd_at")
        assert "val/robust_acc" in header
    hparams = (out / "pgd_at" / "hparams.yaml").read_text()
    assert "robust_train/AdversarialTraining" in hparams
    assert "robust_train/AdversarialTraining" not in (out / "standard" / "hparams.yaml").read_text()

    # fine-tuning goes on from those weights
    checkpoint = next((out / "pgd_at" / "checkpoints").glob("*.ckpt"))
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    (tmp_path / "second").mkdir()
    tuned = run(monkeypatch, tmp_path / "second", "recipe=trades", f"ckpt={checkpoint}", "model.lr=1e-30", *SMALL, *few)
    after = torch.load(next((tuned / "trades" / "checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
    weights = [k for k in before if k.endswith("weight")]
    assert weights
    assert all(torch.equal(before[k], after[k]) for k in weights)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ckpt=nowhere.ckpt",), "ckpt: there is no file"),
        (("callbacks.adversarial_training.attack._target_=os.system",), "not below an allowed package"),
        (("callbacks.adversarial_training.attack.steps=0",), "pgd.steps must be a whole number >= 1, got 0"),
        (("threat.eps=-1",), "threat.eps must be >= 0"),
        (("threat.norm=l7",), "threat.norm must be one of"),
        (("judge.attacks.pgd=null", "judge.attacks.apgd=null"), "judge.attacks: no attack is left"),
    ],
)
def test_bad_input_is_one_line(arguments, says, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tmp_path, "recipe=pgd_at", "trainer.fast_dev_run=true", *SMALL[:2], *arguments)
    assert says in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_the_users_own_module_and_data(monkeypatch, tmp_path):
    pytest.importorskip("torchattacks")
    (tmp_path / "my_net.py").write_text(
        "import torch\n"
        "from robust_train.starter import Classifier\n"
        "class Net(Classifier):\n"
        "    def __init__(self, width):\n"
        "        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(),"
        " torch.nn.Linear(width, 10)))\n"
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("_target_: my_net.Net\nwidth: 8\n")
    common = (
        "--config-dir",
        str(tmp_path / "conf"),
        "recipe=pgd_at",
        "model=mine",
        "trainer.fast_dev_run=true",
        *SMALL[1:],
    )
    with pytest.raises(SystemExit, match=r"pass allow=\[my_net\]"):
        run(monkeypatch, tmp_path, *common)
    out = run(monkeypatch, tmp_path, *common, "allow=[my_net]")
    assert (out / "result.json").is_file()

    (tmp_path / "again").mkdir()
    short = ("recipe=pgd_at", "model._target_=my_net.Net", "+model.width=4", "allow=[my_net]")
    out = run(monkeypatch, tmp_path / "again", *short, "trainer.fast_dev_run=true", *SMALL[1:])
    assert result(out)["config"]["model"] == {"_target_": "my_net.Net", "width": 4}


def test_without_torchattacks_the_judges_that_need_it_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    out = run(monkeypatch, tmp_path, "recipe=standard", "trainer.fast_dev_run=true", *SMALL)
    assert "judge.attacks.apgd is not run: torchattacks is not installed" in capsys.readouterr().out
    assert "robust_acc_apgd" not in json.loads((out / "result.json").read_text())["results"]["standard"]


def test_poisoned_data_are_filtered_and_measured(monkeypatch, tmp_path, capsys):
    few = ("trainer.max_epochs=2", "judge.limit_batches=1", "judge.attacks.apgd=null", "trainer.log_every_n_steps=1")
    chosen = ("recipe=filtered", "poison=badnets", "poison.size=2", "callbacks.data_filter.probe.epochs=2")
    out = run(monkeypatch, tmp_path, *chosen, "baseline=true", *SMALL, *few)
    results = json.loads((out / "result.json").read_text())["results"]
    assert {"attack_success_rate", "clean_acc"} <= set(results["standard"]) & set(results["filtered"])
    report = json.loads((out / "filtered" / "filter_report.json").read_text())
    assert next(iter(report)) == "simulation"
    assert report["simulation"]["poisoned_rows"] == 54
    assert results["filtered"]["filter_kept"] == report["kept"]
    assert "poisoned on purpose" in (out / "filtered" / "filter_report.html").read_text()
    assert not (out / "standard" / "filter_report.json").exists()
    assert "trigger works" in capsys.readouterr().out


def test_a_manifest_is_written_verified_and_has_the_root_that_a_filter_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robust-train", "manifest", "data=digits"])
    cli.main()
    assert json.loads(Path("manifest.json").read_text())["root"] in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["robust-train", "verify", "manifest.json"])
    cli.main()
    assert "Equal" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["robust-train", "verify", "manifest.json", "data=digits", "data.seed=1"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    monkeypatch.setattr(sys, "argv", ["robust-train", "manifest", "data=nothing", "--out", "other.json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
