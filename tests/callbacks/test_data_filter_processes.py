"""Two processes on CPU. Each test starts them as a user would: a script with ``devices=2``, or with ``torchrun``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filter_kit import N, flipped, table

pytestmark = pytest.mark.ddp
SCRIPT = Path(__file__).with_name("filter_script.py")


def launch(folder: Path, scenario: str, *, elastic: bool = False) -> list[Any]:
    """What each of the two ranks ended with."""
    out = folder / scenario
    paths = os.pathsep.join(str(path) for path in (SCRIPT.parent, SCRIPT.parent.parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if elastic else []
    command = [sys.executable, *torchrun, str(SCRIPT), str(out), scenario]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("elastic", [False, True])
def test_the_first_process_decides_and_all_train_on_what_is_left(elastic, tmp_path):
    first, second = launch(tmp_path, "found", elastic=elastic)
    kept = set(first["kept"])
    bad = flipped(table())[1]
    assert first["kept"] == second["kept"]
    assert len(kept & set(bad.nonzero()[:, 0].tolist())) <= 0.2 * bad.sum()
    assert (first["probes"], second["probes"]) == (2, 0)
    share = -(-len(kept) // 2)
    for one, other in zip(first["epochs"], second["epochs"], strict=True):
        assert set(one) | set(other) == kept
        assert len(one) == len(other) == share  # one row is drawn twice where their number is odd
    batches = -(-share // 16)
    for rank in (first, second):
        assert rank["steps"] == rank["total"] == 2 * batches
        assert rank["validated"] == 1 + 2
        assert rank["metrics"]["ranks"] == 2
        assert rank["metrics"]["filter/kept"] == len(kept)
        assert sum(rank["together"]) == 2 * 2 * share
    assert first["weights"] == pytest.approx(second["weights"], abs=1e-4)
    written = {path.name for path in tmp_path.iterdir()}
    files = {"filter_mask.json", "filter_report.json", "filter_decisions.csv", "quarantine.json"}
    assert files <= written
    assert not [name for name in written if name.startswith(".")]


def test_a_simulated_poison_is_the_same_on_all_processes(tmp_path):
    first, second = launch(tmp_path, "simulated")
    assert first["poisoned"] == second["poisoned"]
    assert first["kept"] == second["kept"]
    found = json.loads((tmp_path / "filter_report.json").read_text())["simulation"]
    assert found["tpr"] >= 0.8
    assert found["fpr"] <= 0.05


def test_an_error_of_the_first_process_ends_all_and_the_next_fit_works(tmp_path):
    first, second = launch(tmp_path, "errors")
    expected = ("found no logits", "only the first process sees this", None, "no such file")
    for one, other, said in zip(first, second, expected, strict=True):
        if said is None:
            left = {row for rank in (one, other) for row in rank["epochs"][0]}
            assert left == {row for row in range(N) if row % 6}
        else:
            assert said in one["error"]
            assert other["error"].startswith("RuntimeError: the first process failed: ")
            assert said in other["error"]
