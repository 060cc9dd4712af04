"""The audit of DP-SGD rejects what is broken, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from planted_faults import FAULTS

from robust_train import DPSGD
from robust_train.callbacks.dp_audit import audit_dp_sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # of the hooks engine
]
ENGINES = ("book_keeping", "hooks")
SMALL = {"canaries": 512, "steps": 20}
SCRIPT = Path(__file__).with_name("dp_audit_script.py")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("physical", [None, 150])
def test_the_correct_engine_is_consistent(engine, physical):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = audit_dp_sgd(partial(DPSGD, engine=engine, physical_batch_size=physical), **SMALL)
    assert found.verdict == "consistent", found
    assert found.faults == ()
    assert found.bound < found.claimed < found.ceiling
    assert found.draws == 512 * 20 // 4
    assert found.noise == pytest.approx(1.0, abs=0.05)
    assert found.signal == pytest.approx(0.5, abs=0.08)
    assert torch.equal(before, torch.get_rng_state())
    json.dumps(found.to_dict())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected(fault, engine):
    found = audit_dp_sgd(partial(FAULTS[fault], engine=engine, physical_batch_size=150), **SMALL)
    assert found.verdict == "rejected", found
    if fault == "shuffled, reported as Poisson":
        assert "independent coin flips" in found.faults[-1]
    elif fault == "steps that are not counted":
        assert found.faults == ("20 steps were taken, and 15 are in the history",)
    else:
        assert found.bound > found.claimed
        assert found.faults[0].startswith("epsilon is at least")


def test_too_few_draws_say_that_they_are_too_few():
    found = audit_dp_sgd(partial(DPSGD, engine="book_keeping"), canaries=8, steps=4)
    assert found.verdict == "too weak to tell"
    assert found.ceiling < found.claimed


@pytest.mark.parametrize("settings", [{"canaries": 4}, {"canaries": 10}, {"steps": 3}, {"steps": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="audit_dp_sgd"):
        audit_dp_sgd(**settings)


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["frozen", "canaries"])
@pytest.mark.parametrize(("fault", "said"), [("none", "consistent"), ("NoiseOnOneRank", "rejected")])
def test_two_processes_are_judged_by_the_one_that_reveals_most(fault, said, kind, tmp_path):
    command = [sys.executable, str(SCRIPT), kind, fault]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        assert found["verdict"] == said, found
