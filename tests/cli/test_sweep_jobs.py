"""Many jobs: one after another, side by side, in processes of an engine; and their table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from cli_kit import QUICK, command, result
from omegaconf import OmegaConf

from robust_train.cli.train import objective
from robust_train.config import ConfigError
from robust_train.hydra_plugin import slug


def start(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``robust-train`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "robust_train.cli", *arguments]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)


def test_jobs_have_folders_of_their_own_whatever_the_order_of_overrides():
    assert slug(["seed=1", "threat.eps=0.1", "recipe=pgd_at"]) == "recipe=pgd_at,seed=1,threat.eps=0.1"
    assert slug(["recipe=pgd_at", "seed=1"]) == slug(["seed=1", "recipe=pgd_at"])
    assert slug([]) == "defaults"
    odd = {slug([text]) for text in ("threat.eps=2/255", "threat.eps=2_255", "threat.eps=2 255", "x=" + "y" * 300)}
    assert len(odd) == 4
    assert all(len(name) < 140 and "/" not in name for name in odd)


def test_a_failed_job_stops_no_other_and_the_same_line_runs_what_is_missing(monkeypatch, tmp_path, capsys):
    line = ("-m", "recipe=standard", "seed=0,-1,1", *QUICK)
    with pytest.raises(SystemExit, match="robust-train: seed: must be a whole number from 0"):
        command(monkeypatch, tmp_path, *line)
    captured = capsys.readouterr()
    assert "job 1 failed (recipe=standard seed=-1" in captured.err
    folders = {folder.name.split(",")[1]: folder for folder in (tmp_path / "runs" / "sweep").glob("recipe=*")}
    assert {name for name, folder in folders.items() if (folder / "result.json").is_file()} == {"seed=0", "seed=1"}
    note = (folders["seed=-1"] / "error.txt").read_text()
    assert note.startswith("seed: must be a whole number from 0 to 4294967295, got -1\n")
    assert "Traceback" in note

    capsys.readouterr()
    command(monkeypatch, tmp_path, "sweep-table", "runs/sweep")
    said = capsys.readouterr().out
    assert "seed: must be a whole number" in said
    assert "2 finished, 1 unfinished" in said
    rows = list(csv.DictReader((tmp_path / "runs" / "sweep" / "sweep.csv").read_text().splitlines()))
    assert len(rows) >= 1
    assert "<svg" in (tmp_path / "runs" / "sweep" / "sweep.html").read_text()

    command(monkeypatch, tmp_path, *line[:2], "seed=0,1", *line[3:])
    assert capsys.readouterr().out.count("finished before") == 2
    changed = json.loads((folders["seed=0"] / "result.json").read_text())
    changed["config"]["model"]["lr"] = 7  # as if the defaults had been others then
    (folders["seed=0"] / "result.json").write_text(json.dumps(changed))
    command(monkeypatch, tmp_path, *line[:2], "seed=0,1", *line[3:])
    assert capsys.readouterr().out.count("finished before") == 1
    assert result(folders["seed=0"])["config"]["model"]["lr"] != 7


@pytest.mark.parametrize(
    ("optimize", "says"),
    [("robust_ac", "did you mean 'robust_acc'?"), ("[]", "is none of"), ("[clean_acc,speed]", "'speed' is none of")],
)
def test_what_is_to_be_optimized_is_checked_before_training(optimize, says, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path, "recipe=standard", f"optimize={optimize}", *QUICK)
    assert says in str(stopped.value)


def test_a_job_returns_a_number_or_several():
    found = {"clean_acc": 0.9, "robust_acc": 0.5, "epsilon": 3.0}
    assert objective(OmegaConf.create({"optimize": "robust_acc"}), found) == 0.5
    assert objective(OmegaConf.create({"optimize": ["clean_acc", "epsilon"]}), found) == (0.9, 3.0)
    assert objective(OmegaConf.create({"optimize": "robust_acc"}), {"robust_loss": 2.0}) == -2.0
    with pytest.raises(ConfigError, match="epsilon was not measured in this run; measured: clean_acc"):
        objective(OmegaConf.create({"optimize": "epsilon"}), {"clean_acc": 0.9})


def test_a_folder_without_jobs_has_no_table(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="holds no jobs"):
        command(monkeypatch, tmp_path, "sweep-table", ".")
    with pytest.raises(SystemExit, match="there is no folder"):
        command(monkeypatch, tmp_path, "sweep-table", "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_plugins.hydra_joblib_launcher", ("hydra/launcher=cores", "hydra.launcher.n_jobs=2")),
        ("hydra_plugins.hydra_submitit_launcher", ("hydra/launcher=slurm_local",)),
    ],
)
def test_jobs_side_by_side(plugin, launcher, tmp_path):
    pytest.importorskip(plugin)
    line = ("-m", *launcher, "recipe=standard,pgd_at", "seed=0,-1", *QUICK, "hydra.sweep.dir=jobs")
    done = start(tmp_path, *line)
    assert done.returncode == 1
    assert "robust-train: seed: must be a whole number" in done.stderr
    assert "Traceback" not in done.stderr
    finished = [path.parent.name for path in (tmp_path / "jobs").glob("*/result.json")]
    assert sorted(name.split(",")[0] for name in finished) == ["recipe=pgd_at", "recipe=standard"]
    assert len(list((tmp_path / "jobs").glob("*/error.txt"))) == 2


@pytest.mark.ddp
def test_two_processes_train_and_the_first_one_judges(tmp_path):
    words = ("recipe=pgd_at", "baseline=true", "trainer=ddp", "trainer.accelerator=cpu", *QUICK, "hydra.run.dir=out")
    done = start(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stdout.count("Test accuracy within") == 1
    assert set(result(tmp_path / "out")["results"]) == {"standard", "pgd_at"}
