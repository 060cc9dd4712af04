"""Run by test_dp_sgd_processes.py as a user runs a script: trains privately, and writes what each rank ended with."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from foreign.runs import make_trainer  # noqa: E402
from test_dp_sgd import Net, loader  # noqa: E402

from robust_train import DPSGD  # noqa: E402


class Counts(torch.optim.SGD):
    """Leaves a mark for each step that was taken, in a way that survives a kill."""

    def step(self, closure=None):
        loss = closure()
        with Path("steps").open("a") as file:
            file.write("x")
        super().step()
        return loss


class Counted(Net):
    def configure_optimizers(self):
        return Counts(self.parameters(), lr=self.lr)


def main(what: str, settings: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = json.loads(settings)
    fit = options.pop("fit", {})
    callback = DPSGD(**options)
    if what == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo", **fit.pop("strategy", {}))
        fit |= {"strategy": strategy, "devices": 2, "use_distributed_sampler": True}
        module, checkpoint, resume = Net(), [], None
    else:  # interrupted at any time, and resumed from the last checkpoint
        module, resume = Counted(), "last.ckpt" if Path("last.ckpt").exists() else None
        checkpoint = [ModelCheckpoint(".", filename="last", every_n_train_steps=7, enable_version_counter=False)]
        fit |= {"enable_checkpointing": True}
    trainer = make_trainer(pl.Trainer, callback, *checkpoint, **{"max_epochs": 2, **fit})
    trainer.fit(module, loader(batch_size=4 if what == "ddp" else 8), ckpt_path=resume)
    found = {
        "weights": module.state_dict(),
        "steps": trainer.global_step,
        "epsilon": callback.epsilon(),
        "history": [list(segment) for segment in callback.history],
    }
    torch.save(found, f"out.{trainer.global_rank}")
    if what == "ddp":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
