"""Two processes on CPU. Each test starts them as a user would: a script with ``devices=2``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign.runs import assert_same, portrait

pytestmark = pytest.mark.ddp
SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "clip": {"gradient_clip_val": 0.1},
    "static_graph": {"strategy": {"static_graph": True}},
    "bucket_view": {"strategy": {"gradient_as_bucket_view": True, "find_unused_parameters": True}},
}


def launch(path: Path, what: str, module: str = "nasty", eps: float = 0.1, **settings: Any) -> list[dict[str, Any]]:
    """What each of the two ranks ended with."""
    out = path / f"{what}-{module}-{eps}"
    script = Path(__file__).with_name("ddp_script.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, str(script), str(out), module, what, str(eps), json.dumps(settings)]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}") for rank in (0, 1)]


def weights(rank: dict[str, Any]) -> Any:
    return portrait(rank["weights"])


@pytest.mark.parametrize("what", ["pgd_at", "batch_mode", "trades", "awp", "free_lb", "layer"])
def test_ranks_keep_equal_weights_and_draw_different_starts(what, tmp_path):
    first, second = launch(tmp_path, what, module="grouped_schedule")
    trained = [{k: v for k, v in r["weights"].items() if "running" not in k} for r in (first, second)]
    assert_same(portrait(trained[0]), portrait(trained[1]))
    assert first["steps"] == second["steps"] > 0
    assert len(first["starts"]) == len(second["starts"]) == first["steps"]
    assert not set(first["starts"]) & set(second["starts"])


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_attack_of_radius_zero_changes_nothing(settings, tmp_path):
    module = "unused" if settings == "bucket_view" else "nasty"
    plain = launch(tmp_path, "plain", module, 0, **SETTINGS[settings])
    for mode in ("pgd_at", "batch_mode", "train_mode"):  # eval mode, batch, train
        for a, b in zip(plain, launch(tmp_path, mode, module, 0, **SETTINGS[settings]), strict=True):
            assert_same(weights(a), weights(b))
            assert a["metrics"] == {k: v for k, v in b["metrics"].items() if k != "train/adv_loss"}


def test_evaluation_agrees_on_all_ranks_and_leaves_training_alone(tmp_path):
    first, second = launch(tmp_path, "both", "tuple")
    alone, _ = launch(tmp_path, "pgd_at", "tuple")
    for name in ("val/clean_acc", "val/robust_acc", "val/robust_acc_pgd"):
        assert first["metrics"][name] == second["metrics"][name]
    assert first["metrics"]["val/robust_acc"] <= first["metrics"]["val/clean_acc"]
    assert_same(weights(first), weights(alone))


@pytest.mark.parametrize("what", ["grad_align", "free", "helper", "extra"])
def test_ranks_keep_equal_weights_in_other_ways_of_training(what, tmp_path):
    first, second = launch(tmp_path, what, "grouped_schedule")
    trained = [{k: v for k, v in r["weights"].items() if "running" not in k} for r in (first, second)]
    assert_same(portrait(trained[0]), portrait(trained[1]))
    assert first["steps"] == second["steps"] > 0


def test_what_is_watched_in_training_agrees_on_all_ranks_and_leaves_it_alone(tmp_path):
    first, second = launch(tmp_path, "watched", "tuple")
    alone, _ = launch(tmp_path, "pgd_at", "tuple")
    for name in ("train/own_attack_acc", "train/multi_step_acc", "train/robust_acc", "train/robust_gap"):
        assert first["metrics"][name] == second["metrics"][name]
    assert_same(weights(first), weights(alone))


def test_gradients_of_sharded_weights_are_not_picked_up(tmp_path):
    with pytest.raises(AssertionError, match="FreeLB cannot pick up gradients of sharded parameters"):
        launch(tmp_path, "free_lb", "sharded", strategy={"data_parallel_size": 2, "tensor_parallel_size": 1})


def test_sharded_weights_are_not_perturbed(tmp_path):
    with pytest.raises(AssertionError, match="each process holds only a part of every weight"):
        launch(tmp_path, "awp", "sharded", strategy={"data_parallel_size": 2, "tensor_parallel_size": 1})


@pytest.mark.parametrize("name", ["gan", "manual_accumulation", "second_order", "returns_dict"])
def test_foreign_modules(name, tmp_path):
    unused = {"find_unused_parameters": True}  # a GAN's losses use one network each
    first, second = launch(tmp_path, "both", name, strategy=unused if name == "gan" else {})
    trained = [{k: v for k, v in r["weights"].items() if "running" not in k} for r in (first, second)]
    assert_same(portrait(trained[0]), portrait(trained[1]))


def test_fully_sharded_parameters(tmp_path):
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    plain = launch(tmp_path, "plain", "sharded", 0, strategy=sizes)
    for what in ("pgd_at", "evaluation"):
        for a, b in zip(plain, launch(tmp_path, what, "sharded", 0, strategy=sizes), strict=True):
            assert_same(weights(a), weights(b))
    for what in ("pgd_at", "trades"):
        first, second = launch(tmp_path, what, "sharded", strategy=sizes)
        assert_same(weights(first), weights(second))
        assert weights(first) != weights(plain[0])
        assert not set(first["starts"]) & set(second["starts"])


def test_ranks_that_share_a_batch_share_its_random_starts(tmp_path):
    """Tensor parallelism: the two ranks hold parts of one model and are given the same batches."""
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    first, second = launch(tmp_path, "pgd_at", "sharded", strategy=sizes)
    assert first["starts"] == second["starts"]
