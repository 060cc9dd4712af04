"""A checkpoint, judged."""

from __future__ import annotations

import csv

import pytest
import torch
from cli_kit import QUICK, SMALL, command, result, run


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
