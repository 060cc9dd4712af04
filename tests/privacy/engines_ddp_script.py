"""Two processes, each with its half of the batch: ``python engines_ddp_script.py ENGINE FOLDER``."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from privacy.exact import assert_near, exact, gradients, trained  # noqa: E402

from robust_train.privacy.clipping.flat import Flat  # noqa: E402
from robust_train.privacy.engines.book_keeping import BookKeeping  # noqa: E402
from robust_train.privacy.engines.hooks import Hooks  # noqa: E402


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().flatten(1).sum(1).mean()


def make() -> nn.Module:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(inplace=True), nn.Linear(4, 4), shared, nn.PReLU(), shared
    )


def work(rank: int, kind: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for settings in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}):
        for attach_first in (True, False):
            module = make()
            plain = copy.deepcopy(module)
            engine_of = {"BookKeeping": BookKeeping, "Hooks": Hooks}[kind]
            engine = engine_of(module, trained(module)) if attach_first else None
            parallel = DistributedDataParallel(module, **settings)
            engine = engine or engine_of(module, trained(module))
            for step in range(3):
                torch.manual_seed(10 * step + rank)
                x = torch.randn(5, 2, 6)
                parallel.zero_grad()
                engine.start()
                value = loss(parallel, x)
                engine.arm()
                value.backward()
                result = engine.clipped_sum(5, 1.0, Flat())
                engine.stop()
                expected = exact(gradients(plain, loss, (x,), 5), 1.0, Flat())
                assert_near(result, expected, 1e-5)
                assert all(p.grad is not None for p in module.parameters())
                if kind == "BookKeeping":
                    assert not any(p.grad.any() for p in module.parameters())
            engine.close()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1], sys.argv[2]), 2)
