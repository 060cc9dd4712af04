"""A checkpoint, judged."""

from __future__ import annotations

import csv
from xml.etree import ElementTree

import pytest
import torch
from cli_kit import QUICK, SMALL, command, result, run

from robust_train import AdversarialExamples
from robust_train.cli.evaluate import _spelled


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    (tmp_path / "trained").mkdir()
    out = run(monkeypatch, tmp_path / "trained", "recipe=standard", *QUICK, "threat.eps=0.05")
    return next((out / "standard" / "checkpoints").glob("*.ckpt"))


def test_a_runs_checkpoint_is_judged_as_the_run_was_told(checkpoint, monkeypatch, tmp_path, capsys):
    few = ("judge.limit_batches=1", "attack.steps=2", "trainer.enable_progress_bar=false")
    out = run(monkeypatch, tmp_path, "evaluate", f"ckpt={checkpoint}", "attack=pgd", *few)
    said = capsys.readouterr().out
    assert "model.network.channels=4" in said  # of the run
    assert "Linf ball of radius 0.05" in said
    found = result(out)
    trained = result(checkpoint.parents[2])
    (metrics,) = found["results"].values()
    assert set(found["attacks"]) == {"pgd"}
    assert metrics["clean_acc"] == trained["results"]["standard"]["clean_acc"]
    assert metrics["robust_acc"] == metrics["robust_acc_pgd"] <= metrics["clean_acc"]
    assert next(csv.DictReader((out / "result.csv").read_text().splitlines()))["run"] == checkpoint.stem


def test_several_attacks_count_by_the_worst(checkpoint, monkeypatch, tmp_path):
    more = ("attack=fgsm", "+attack@judge.attacks.noise=uniform_noise", "threat.eps=0.3")
    out = run(monkeypatch, tmp_path, "evaluate", f"ckpt={checkpoint}", *more, "judge.limit_batches=1", SMALL[1])
    found = result(out)
    (metrics,) = found["results"].values()
    assert set(found["attacks"]) == {"fgsm", "noise"}
    assert "0.3" in found["threat"]
    assert metrics["robust_acc"] <= min(metrics["robust_acc_fgsm"], metrics["robust_acc_noise"])


def test_weights_of_a_private_run_fit(monkeypatch, tmp_path):
    (tmp_path / "trained").mkdir()
    out = run(monkeypatch, tmp_path / "trained", "recipe=dp_sgd", *QUICK)
    path = next((out / "dp_sgd" / "checkpoints").glob("*.ckpt"))
    few = ("judge.limit_batches=1", "attack.steps=1", SMALL[1])
    judged = result(run(monkeypatch, tmp_path, "evaluate", f"ckpt={path}", *few))
    assert judged["results"][path.stem]["clean_acc"] == result(out)["results"]["dp_sgd"]["clean_acc"]


SHORT_AUTOATTACK = ("attack.version=custom", "attack.steps=2", "attack.targets=2", "attack.queries=5")


def test_autoattack_in_shards_goes_on_and_leaves_everything(checkpoint, monkeypatch, tmp_path, capsys):
    words = (
        "evaluate",
        f"ckpt={checkpoint}",
        "attack=autoattack",
        *SHORT_AUTOATTACK,
        "judge.limit_batches=2",
        SMALL[1],
    )
    words += ("judge.shards=shards", "judge.corruptions=[contrast,jpeg]", "judge.curve=[1,2]", "judge.examples=20")
    out = run(monkeypatch, tmp_path, *words)
    first = result(out)
    (metrics,) = first["results"].values()
    assert set(first["attacks"]) == {"auto_attack"}
    found = metrics["evaluation"]
    assert found["rates"]["robust_acc"]["value"] == pytest.approx(metrics["robust_acc"])
    assert found["rates"]["robust_acc_auto_attack"]["n"] == found["n"] == 128
    assert found["rates"]["clean_acc"]["low"] < metrics["clean_acc"] < found["rates"]["clean_acc"]["high"]
    assert sum(part["clean_acc"]["n"] for part in found["by_class"].values()) == 128
    assert found["checked"]
    assert len(found["corruptions"]) == 10
    assert [point["eps"] for point in found["curve"]] == [0.0, 0.05, 0.1]
    kept = AdversarialExamples.read(out / "adversarial_examples.safetensors")
    assert len(kept.inputs) == 20
    ElementTree.parse(out / "figure.svg")  # well-formed  # noqa: S314
    drawing = (out / "figure.svg").read_text()
    assert "Worst case by class" in drawing
    assert "Natural corruptions" in drawing
    said = capsys.readouterr().out
    assert "of 128 examples (95 % interval)" in said
    assert "under natural corruptions" in said

    shards = sorted((tmp_path / "shards").rglob("shard-*"))
    assert len(shards) == 3 * 2
    shards[0].unlink()  # as if it had been interrupted there
    times = [path.stat().st_mtime_ns for path in shards[1:]]
    command(monkeypatch, tmp_path, *words, f"hydra.run.dir={tmp_path / 'again'}")
    assert result(tmp_path / "again")["results"] == first["results"]
    assert [path.stat().st_mtime_ns for path in shards[1:]] == times
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, *words, "attack.steps=3", f"hydra.run.dir={tmp_path / 'other'}")
    assert "holds an evaluation with another attacks" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_warnings_stand_in_the_result_on_the_terminal_and_in_the_figure(checkpoint, monkeypatch, tmp_path, capsys):
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    last = [name for name in weights if name.startswith("network.") and weights[name].shape[:1] == (10,)]
    assert last
    for name in last:
        weights[name] *= 1e5  # saturated
    torch.save({"state_dict": weights}, tmp_path / "saturated.pt")
    few = ("judge.limit_batches=1", "attack.steps=2", "model.network.channels=4", SMALL[1])
    out = run(monkeypatch, tmp_path, "evaluate", f"ckpt={tmp_path / 'saturated.pt'}", *few)
    (metrics,) = result(out)["results"].values()
    flags = {flag["name"]: flag for flag in metrics["evaluation"]["flags"]}
    assert flags["zero_gradients"]["evidence"]["share"] == 1
    assert "WARNING, zero_gradients" in capsys.readouterr().out
    assert "WARNING, zero_gradients" in (out / "figure.svg").read_text()
    (tmp_path / "second").mkdir()
    out = run(
        monkeypatch, tmp_path / "second", "evaluate", f"ckpt={tmp_path / 'saturated.pt'}", *few, "judge.checks=false"
    )
    (metrics,) = result(out)["results"].values()
    assert not metrics["evaluation"]["flags"]
    assert not metrics["evaluation"]["checked"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("attack=autoattack", "attack=auto_attack"),
        ("attack=AutoAttack", "attack=auto_attack"),
        ("+attack@judge.attacks.x=auto-attack", "+attack@judge.attacks.x=auto_attack"),
        ("attack=PGD", "attack=pgd"),
        ("attack=pgd,fgsm", "attack=pgd,fgsm"),
        ("attack=other", "attack=other"),
        ("attack.steps=3", "attack.steps=3"),
        ("ckpt=PGD", "ckpt=PGD"),
    ],
)
def test_attacks_are_found_however_they_are_spelled(typed, meant):
    assert _spelled(typed) == meant


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("judge.checks=maybe", "judge.checks: must be true or false, got 'maybe'"),
        ("judge.draws=0", "judge.draws: must be a whole number >= 1, or null, got 0"),
        ("judge.examples=-1", "judge.examples: must be a whole number from 0 to 4096, got -1"),
        ("judge.examples=1e9", "judge.examples: must be a whole number from 0 to 4096"),
        ("judge.shards=3", "judge.shards: must be a folder, or null, got 3"),
        ("judge.shards=''", "judge.shards: must be a folder, or null, got ''"),
        ("judge.groups=[1]", "judge.groups: must be an index, a name or a dotted path, or null, got [1]"),
        ("judge.corruptions=some", "judge.corruptions: must be true, false or a list of kinds, got 'some'"),
        ("judge.corruptions=[snow]", "judge: corruptions.kinds must be among gaussian_noise"),
        ("judge.corruptions=[]", "judge: corruptions.kinds must be a list"),
        ("optimize=corruption_acc", "optimize: corruption_acc is measured with judge.corruptions=true"),
        ("+judge.shard=a", "judge.shard: there is no such setting (did you mean 'shards'?)"),
    ],
)
def test_wrong_settings_of_the_judge_are_one_line(word, says, monkeypatch, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "evaluate", "ckpt=other.pt", word, f"hydra.run.dir={tmp_path / 'out'}")
    assert says in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out" / "result.json").exists()


def test_training_has_no_shards(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"judge\.shards: there is no such setting"):
        command(monkeypatch, tmp_path, "recipe=standard", "+judge.shards=a", f"hydra.run.dir={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "ckpt: missing; name the checkpoint"),
        (("ckpt=nowhere.ckpt",), "ckpt: there is no file"),
        (("ckpt=other.pt",), "does not fit model=Classifier"),
        (("ckpt=other.pt", "attack=pgdd"), "attack: there is no 'pgdd' (did you mean 'pgd'?)"),
    ],
)
def test_bad_input_is_one_line(words, says, monkeypatch, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "evaluate", *words, f"hydra.run.dir={tmp_path / 'out'}")
    assert says in str(stopped.value)
    assert "\n" not in str(stopped.value)
