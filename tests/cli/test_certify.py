"""What is proved of a checkpoint, on the command line."""

from __future__ import annotations

import csv

import pytest
import torch
from cli_kit import command, result, run

from robust_train.starter import MLP, Classifier

MODEL = ("model=mlp", "model.network.hidden=[16]", "limit=12")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": Classifier(MLP(hidden=(16,))).state_dict()}, path)
    return path


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_smoothing_says_what_it_certifies_and_the_files_agree(checkpoint, monkeypatch, tmp_path, capsys):
    few = ("sigma=1/2", "n0=20", "n=100", "alpha=0.01", "radii=[0.4,0,0.2]")
    out = run(monkeypatch, tmp_path, "certify", f"ckpt={checkpoint}", *MODEL, *few)
    found = result(out)
    assert "12 test examples" in capsys.readouterr().out
    assert found["settings"] | {"largest_radius": 0} == {
        "sigma": 0.5, "n0": 20, "n": 100, "alpha": 0.01, "largest_radius": 0,
    }  # fmt: skip
    curve = found["curve"]
    assert [point["radius"] for point in curve] == [0, 0.2, 0.4]
    shares = [point["certified_acc"] for point in curve]
    assert shares == sorted(shares, reverse=True)
    assert all(point["low"] <= point["certified_acc"] <= point["high"] for point in curve)
    assert [float(row["certified_acc"]) for row in rows(out / "result.csv")] == shares
    examples = rows(out / "certificates.csv")
    assert len(examples) == 12
    for radius, share in zip((0, 0.2, 0.4), shares, strict=True):
        sure = [row["predicted"] == row["label"] and float(row["radius"]) > radius for row in examples]
        assert share == pytest.approx(sum(sure) / 12)
    (tmp_path / "again").mkdir()
    again = run(monkeypatch, tmp_path / "again", "certify", f"ckpt={checkpoint}", *MODEL, *few, "batch=64")
    assert (again / "certificates.csv").read_text() == (out / "certificates.csv").read_text()


@pytest.mark.parametrize("method", ["ibp", "crown_ibp"])
def test_bounds_within_the_threat(method, checkpoint, monkeypatch, tmp_path):
    words = (f"method={method}", "threat.eps=0.08", "batch=5")
    out = run(monkeypatch, tmp_path, "certify", f"ckpt={checkpoint}", *MODEL, *words)
    found = result(out)
    radii = [point["radius"] for point in found["curve"]]
    assert radii[0] == 0
    assert radii[-1] == 0.08
    assert len(radii) == 9
    assert "Linf radius" in found["statement"]
    shares = [point["certified_acc"] for point in found["curve"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(int(row["verified_0"]) for row in rows(out / "certificates.csv")) == round(12 * shares[0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "ckpt: missing; name the checkpoint"),
        (("ckpt=nowhere.ckpt",), "ckpt: there is no file"),
        (("ckpt=net.ckpt", "method=ipb"), "method: 'ipb' is none of smoothing, ibp, crown_ibp (did you mean 'ibp'?)"),
        (("ckpt=net.ckpt", "sigma=0"), "sigma: must be > 0 and finite, got 0"),
        (("ckpt=net.ckpt", "alpha=0.7"), "alpha: must be in (0, 0.5), got 0.7"),
        (("ckpt=net.ckpt", "n=many"), "n: must be a whole number >= 1, got 'many'"),
        (("ckpt=net.ckpt", "radii=0.5"), "radii: must be a list of numbers >= 0, or null, got 0.5"),
        (("ckpt=net.ckpt", "limit=0"), "limit: must be a whole number >= 1, or null, got 0"),
        (("ckpt=net.ckpt", "labels=''"), "labels: must be an index"),
        (("ckpt=net.ckpt", "seed=-1"), "seed: must be a whole number from 0"),
        (("ckpt=net.ckpt", "batch=1.5"), "batch: must be a whole number >= 1, got 1.5"),
        (("ckpt=net.ckpt", "threat.eps=-1"), "threat: threat.eps must be >= 0"),
        (("ckpt=net.ckpt", "sigmaa=1"), "sigmaa"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(words, says, checkpoint, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "certify", *words, f"hydra.run.dir={tmp_path / 'out'}")
    assert says in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out" / "result.json").exists()
