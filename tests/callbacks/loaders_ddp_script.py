"""Run by test_loaders.py in two processes: the rows that each rank is trained on, to ``<out>.<rank>``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from loader_kinds import KEEP, KINDS, Kind, OwnOrder, Shuffled, tensors
from pytorch_lightning.strategies import DDPStrategy
from test_loaders import fit
from torch.utils.data import DataLoader, DistributedSampler

from robust_train.callbacks._loaders import filtered


class Ranked(OwnOrder):
    """Draws its own process's rows, without saying so."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        self.epoch += 1
        return iter(torch.randperm(self.count * 2, generator=seeded(self.epoch)).tolist()[rank::2])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


OWN = {
    "ranked": Kind(lambda: DataLoader(tensors(), 4, sampler=Ranked(12))),
    "users_distributed": Kind(lambda: DataLoader(tensors(), 4, sampler=DistributedSampler(tensors()))),
    "shuffled_batches": Kind(lambda: DataLoader(tensors(), batch_sampler=Shuffled())),
}


def main(out: str, cases: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for kind, source, share in json.loads(cases):
        pl.seed_everything(0, verbose=False)
        try:
            module, callback, trainer, _ = fit(
                (OWN | KINDS)[kind].make,
                source,
                lambda loader: filtered(loader, KEEP),
                prepared=True,
                devices=2,
                strategy=DDPStrategy(process_group_backend="gloo"),
                use_distributed_sampler=share,
            )
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
            continue
        batches = [batch for epoch in module.seen for batch in epoch]
        found.append(
            {
                "epochs": module.seen,
                "batches": trainer.num_training_batches,
                "recorded": callback.recorded == batches,
                "validated": module.validated,
            }
        )
    rank = torch.distributed.get_rank()
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    # Lightning leaves gloo's running, whose threads may outlive the interpreter
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
