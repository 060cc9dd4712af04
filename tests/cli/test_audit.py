"""A checkpoint, audited for membership inference."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from cli_kit import QUICK, command, run

FEW = ("audit.preset=quick", "audit.epochs=1", "audit.max_rows=120")


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    (tmp_path / "trained").mkdir()
    out = run(monkeypatch, tmp_path / "trained", "recipe=standard", *QUICK)
    return next((out / "standard" / "checkpoints").glob("*.ckpt"))


def test_a_runs_checkpoint_is_audited_with_and_without_perturbed_answers(checkpoint, monkeypatch, tmp_path, capsys):
    words = (f"ckpt={checkpoint}", *FEW, "+output@audit.outputs.labels=label_only", "audit.exposed=5")
    out = run(monkeypatch, tmp_path, "audit", *words)
    said = capsys.readouterr().out
    assert "model.network.channels=4" in said  # of the run
    assert "Membership inference: 120 members, 120 non-members" in said
    assert "rmia, labels" in said
    found = json.loads((out / "audit.json").read_text())
    assert set(found["attacks"]) == {"loss_threshold", "rmia"}
    assert set(found["outputs"]) == {"labels"}
    assert 0.3 < found["attacks"]["loss_threshold"]["auc"] < 0.7
    assert stat.S_IMODE((out / "most_exposed.csv").stat().st_mode) == 0o600
    assert len(list((tmp_path / "runs" / "references").glob("*.safetensors"))) == 1


def test_the_references_are_trained_as_long_as_the_checkpoint(checkpoint, monkeypatch, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({"state_dict": state["state_dict"], "epoch": 1}, tmp_path / "two.ckpt")
    few = ("audit.preset=quick", "audit.cache=null", "model.network.channels=4")
    out = run(monkeypatch, tmp_path, "audit", f"ckpt={tmp_path / 'two.ckpt'}", *few)
    assert json.loads((out / "audit.json").read_text())["reference_epochs"] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "ckpt: missing; name the checkpoint"),
        (("ckpt=nowhere.ckpt",), "ckpt: there is no file"),
        (("ckpt=other.pt",), "does not fit model=Classifier"),
        (("ckpt=other.pt", "audit.preset=fast"), "preset must be quick, standard or thorough, got 'fast'"),
        (("ckpt=other.pt", "audit.holdout=train"), "holdout must be val, test, both or a dataset"),
        (("ckpt=other.pt", "audit.presett=quick"), "audit.presett"),
        (("ckpt=other.pt", "audit=null"), "audit"),
        (("ckpt=other.pt", "seed=-1"), "seed: must be a whole number"),
    ],
)
def test_bad_input_is_one_line(words, says, monkeypatch, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "audit", *words, f"hydra.run.dir={tmp_path / 'out'}")
    assert says in str(stopped.value)
    assert "\n" not in str(stopped.value)
