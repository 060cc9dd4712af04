"""DP-SGD in two processes, and in one that is killed."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from foreign.runs import assert_same, portrait
from test_dp_sgd import BATCH, N, Net, data, flat
from torch.nn.functional import cross_entropy

from robust_train.privacy.entropy import Entropy

SCRIPT = Path(__file__).with_name("dp_script.py")
DDP = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "static_graph": {"strategy": {"static_graph": True}},
    "bucket_view": {"strategy": {"gradient_as_bucket_view": True, "find_unused_parameters": True}},
}


def command(what: str, **settings) -> list[str]:
    return [sys.executable, str(SCRIPT), what, json.dumps(settings)]


def ranks(path: Path, **settings) -> list[dict]:
    done = subprocess.run(command("ddp", **settings), cwd=path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path / f"out.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.ddp
@pytest.mark.parametrize(("fit", "engine"), [*((fit, "book_keeping") for fit in DDP), ("plain", "hooks")])
def test_ranks_keep_equal_weights_and_the_right_epsilon(fit, engine, tmp_path):
    first, second = ranks(tmp_path, noise_multiplier=1.0, accountant="rdp", engine=engine, fit=DDP[fit])
    assert_same(portrait(first["weights"]), portrait(second["weights"]))
    accumulate = DDP[fit].get("accumulate_grad_batches", 1)
    assert first["steps"] == second["steps"] == math.ceil(5 / accumulate) * 2
    assert first["history"] == second["history"] == [[1.0, BATCH * accumulate / N, first["steps"]]]
    assert first["epsilon"] == second["epsilon"] > 0


@pytest.mark.ddp
@pytest.mark.parametrize("physical", [None, 2])
def test_two_processes_sample_one_poisson_batch(physical, tmp_path):
    settings = {"noise_multiplier": 0, "max_grad_norm": 0.3, "unsafe_seed": 5, "physical_batch_size": physical}
    first, _ = ranks(tmp_path, **settings)
    module, dataset = Net(), data()
    streams = [Entropy(5), Entropy(6)]  # each process has a share of its own
    for _ in range(first["steps"]):
        total = torch.zeros_like(flat(module))
        for rank, entropy in enumerate(streams):
            for i in (entropy.uniform(N // 2) < BATCH / N).nonzero()[0]:
                x, y = dataset[rank + 2 * int(i)]
                loss = cross_entropy(module.net(x[None]), y[None])
                g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(module.parameters()))])
                total += g * min(1.0, 0.3 / (float(g.norm()) + 1e-6))
        stepped = flat(module) - 0.1 * total / BATCH
        torch.nn.utils.vector_to_parameters(stepped, module.parameters())
    assert torch.allclose(flat(module), torch.cat([w.flatten() for w in first["weights"].values()]), atol=1e-5)


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_never_reports_too_little(tmp_path):
    settings = {"target_epsilon": 8.0, "target_delta": 1e-3, "accountant": "rdp", "fit": {"max_epochs": 40}}
    kills = random.Random(0)
    for attempt in range(6):
        last = attempt == 5
        process = subprocess.Popen(command("killed", **settings), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        if not last:
            until, deadline = _taken(tmp_path) + kills.randint(8, 25), time.monotonic() + 120
            while _taken(tmp_path) < until and time.monotonic() < deadline:
                time.sleep(0.002)
                if process.poll() is not None:
                    break
            process.kill()
        _, errors = process.communicate(timeout=200)
        if last:
            assert process.returncode == 0, errors[-3000:]
    found = torch.load(tmp_path / "out.0", weights_only=True)
    counted = sum(steps for *_, steps in found["history"])
    assert counted >= _taken(tmp_path) > found["steps"]
    assert counted - _taken(tmp_path) <= 5  # at most the step that each kill caught between journal and weights
    assert 0 < found["epsilon"] <= 8.0


def _taken(path: Path) -> int:
    file = path / "steps"
    return len(file.read_text()) if file.exists() else 0
