"""Defences that belong to a trained model are there when it is judged."""

from __future__ import annotations

import pytest
from cli_kit import QUICK, result, run

FEW = ("trainer.enable_progress_bar=false", "judge.limit_batches=1", "attack.steps=2", "judge.checks=false")
NODE = "callbacks.input_reconstruction"


@pytest.mark.slow
def test_a_checkpoint_is_judged_with_its_reconstruction_or_it_is_said_that_it_is_not(monkeypatch, tmp_path, capsys):
    (tmp_path / "trained").mkdir()
    autoencoder = f"robust_train/reconstruction@{NODE}.reconstruction=denoising_autoencoder"
    words = ("recipe=bit_depth", autoencoder, f"{NODE}.attack.steps=2", *QUICK, "judge.checks=false")
    out = run(monkeypatch, tmp_path / "trained", *words)
    trained = result(out)["results"]["bit_depth"]
    assert trained["adaptive_gain"] == pytest.approx(trained["adaptive/robust_acc"] - trained["undefended/robust_acc"])
    assert trained["robust_acc"] <= trained["robust_acc_pgd_adaptive"]
    path = next((out / "bit_depth" / "checkpoints").glob("*.ckpt"))
    for name, more in {
        "without": (),
        "with": (f"+callback@{NODE}=input_reconstruction", autoencoder, f"{NODE}.attack.steps=2"),
    }.items():
        (tmp_path / name).mkdir()
        capsys.readouterr()
        judged = result(run(monkeypatch, tmp_path / name, "evaluate", f"ckpt={path}", *FEW, *more))
        (found,) = judged["results"].values()
        assert ("adaptive_gain" in found) is (name == "with")
        assert ("The checkpoint's run had InputReconstruction" in capsys.readouterr().out) is (name == "without")
        if name == "with":  # also the autoencoder's weights are those of the run
            assert found["clean_acc"] == trained["clean_acc"]


@pytest.mark.slow
def test_verified_accuracy_is_in_the_verdict_and_in_the_table(monkeypatch, tmp_path, capsys):
    out = run(monkeypatch, tmp_path, "recipe=ibp", "threat.eps=0.05", *QUICK, "judge.checks=false")
    found = result(out)["results"]["ibp"]
    assert 0 <= found["verified_acc"] <= found["robust_acc"] + 1e-6
    assert "verified" in capsys.readouterr().out
    assert "verified_acc" in (out / "result.csv").read_text()
