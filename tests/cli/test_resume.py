"""Runs that were interrupted go on where they were; sweeps finish what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_kit import QUICK, command, result, run

SLOW_NET = """
import os, time
import torch
from robust_train.starter import Classifier

class Net(Classifier):
    '''Stops, or kills its process, at a step that a file names; a step takes a while.'''
    def __init__(self, pause=0.05):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
        self.pause = pause
    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        if self.global_step == 2 and os.path.exists("crash"):
            raise RuntimeError("out of luck")
        if self.global_step == 2 and os.path.exists("kill"):
            os.kill(os.getpid(), 9)
        return super().training_step(batch, batch_idx)
"""
MINE = ("model={_target_: slow_net.Net}", "allow=[slow_net]")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slow_net.py").write_text(SLOW_NET)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "slow.yaml").write_text("_target_: slow_net.Net\npause: 0.05\n")
    return tmp_path


def words(*more: str) -> list[str]:
    small = [word for word in QUICK if not word.startswith(("model.", "trainer.max_epochs", "trainer.limit_train"))]
    return ["--config-dir", "conf", "model=slow", "allow=[slow_net]", "judge.attacks.pgd.steps=1", *small, *more]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "robust_train.cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(folder, monkeypatch, capsys):
    length = ("trainer.max_epochs=3", "trainer.limit_train_batches=8", "model.pause=0.4")
    process = start(folder, *words("recipe=standard", *length, "hydra.run.dir=out"))
    metrics = folder / "out" / "standard" / "checkpoints"
    waited = time.monotonic()
    while not list(metrics.glob("*.ckpt")) and time.monotonic() < waited + 120:  # the end of the first epoch
        time.sleep(0.1)
    time.sleep(0.5)  # somewhere in the second one
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert f"to go on: robust-train resume {folder / 'out'}" in said
    assert "Traceback" not in said
    interrupted = torch.load(metrics / "interrupted.ckpt", weights_only=True)["global_step"]
    assert 8 < interrupted < 24
    assert not (folder / "out" / "result.json").exists()

    with pytest.raises(SystemExit, match="names classes of slow_net; if you trust them, add --allow slow_net"):
        command(monkeypatch, folder, "resume", "out")
    command(monkeypatch, folder, "resume", "out", "--allow", "slow_net")
    assert "going on from" in capsys.readouterr().out
    (last,) = metrics.glob("epoch2*.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 24
    assert set(result(folder / "out")["results"]) == {"standard"}
    command(monkeypatch, folder, "resume", "out", "--allow", "slow_net")
    assert "is finished" in capsys.readouterr().out


def test_a_killed_run_goes_on_after_its_last_epoch(folder, monkeypatch, capsys):
    (folder / "kill").touch()
    length = (
        "recipe=pgd_at",
        "baseline=true",
        "trainer.max_epochs=3",
        "trainer.limit_train_batches=1",
        "model.pause=0",
    )
    process = start(folder, *words(*length, "hydra.run.dir=out"))
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL  # of the baseline, in its third epoch
    (folder / "kill").unlink()
    command(monkeypatch, folder, "resume", "out", "--allow", "slow_net")
    assert "going on from" in capsys.readouterr().out
    found = result(folder / "out")
    assert set(found["results"]) == {"standard", "pgd_at"}
    assert found["overrides"][-1] == "model.pause=0"
    for name in found["results"]:
        (last,) = (folder / "out" / name / "checkpoints").glob("epoch2*.ckpt")
        assert torch.load(last, weights_only=True)["global_step"] == 3


def test_a_folder_that_holds_a_run_is_not_overwritten(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "recipe=standard", *QUICK)
    with pytest.raises(SystemExit, match="holds a run already: choose another, or go on with it: robust-train resume"):
        run(monkeypatch, tmp_path, "recipe=standard", *QUICK)


@pytest.mark.parametrize("argument", ["nowhere", "."])
def test_what_is_no_run_cannot_be_resumed(argument, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="is no run's folder"):
        command(monkeypatch, tmp_path, "resume", argument)


@pytest.mark.slow
def test_a_sweep_finishes_what_is_missing(folder):
    """Twelve jobs; one crashes, one is killed with its process; the same line again runs the missing ones."""
    sweep = words(
        "recipe=standard,pgd_at",
        "threat.eps=2/255,4/255",
        "seed=0,1,2",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=4",
        "model.pause=0",
        "hydra.sweep.dir=jobs",
    )
    few = sweep[-4:]
    sweep.insert(0, "-m")
    (folder / "crash").touch()
    first = start(folder, "-m", *words("recipe=standard", "threat.eps=2/255", "seed=0", *few))
    said = first.communicate(timeout=200)[1]
    assert first.returncode == 1
    assert "job 0 failed" in said
    assert "out of luck" in said
    assert "Traceback" not in said
    (folder / "crash").unlink()

    counting = "\n    def count(self):\n        return sum(map(os.path.isdir, glob.glob('jobs/*')))\n"
    unlucky = SLOW_NET.replace('os.path.exists("crash")', "self.count() == 5")  # the fifth job
    unlucky = "import glob\n" + unlucky.replace('os.path.exists("kill")', "self.count() == 9") + counting
    (folder / "slow_net.py").write_text(unlucky)
    killed = start(folder, *sweep)
    said = killed.communicate(timeout=400)[1]
    assert killed.returncode == -signal.SIGKILL
    jobs = [d for d in (folder / "jobs").iterdir() if d.is_dir()]
    assert len(jobs) == 9
    assert len([d for d in jobs if (d / "result.json").is_file()]) == 7
    assert len([d for d in jobs if (d / "error.txt").is_file()]) == 1

    (folder / "slow_net.py").write_text(SLOW_NET)
    done = {d.name: (d / "result.json").stat().st_mtime_ns for d in jobs if (d / "result.json").is_file()}
    again = start(folder, *sweep)
    out, said = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert out.count("finished before, and left as it is") == 7
    found = {d.name: (d / "result.json").stat().st_mtime_ns for d in (folder / "jobs").iterdir() if d.is_dir()}
    assert len(found) == 12
    assert {name: found[name] for name in done} == done
    assert not list((folder / "jobs").glob("*/error.txt"))
    seeds = sorted(json.loads(path.read_text())["seed"] for path in (folder / "jobs").glob("*/result.json"))
    assert seeds == sorted([0, 1, 2] * 4)
    told = start(folder, "sweep-table", "jobs").communicate(timeout=100)[0]
    assert told.startswith("Jobs: 12 finished. Settings: 4,")
