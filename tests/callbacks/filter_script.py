"""Run by test_data_filter_processes.py in two processes: what each rank was trained on, to ``<out>.<rank>``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from filter_kit import CLASSES, WIDTH, Data, Marked, N, Net, flipped, table
from pytorch_lightning.strategies import DDPStrategy
from torchmetrics.classification import MulticlassAccuracy

from robust_train import DataFilter, PoisonSimulation, Probe
from robust_train.callbacks import _filtering
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.poisons.random_flips import RandomFlips

PROBES: list[int] = []


class Talking(Net):
    """Its metrics and its step talk to the other processes; its schedule is as long as the run."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.together = MulticlassAccuracy(CLASSES), []

    def training_step(self, batch, batch_idx):
        rows = torch.tensor(len(batch[2]))
        dist.all_reduce(rows)
        self.together.append(int(rows))
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("ranks", float(dist.get_world_size()), on_epoch=True, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        self.total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Regression(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(WIDTH, 1)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


class Unlucky(AUM):
    def score(self, rows):
        raise RuntimeError("only the first process sees this")


def fit(callbacks: list[Any], module: Any = None, data: Any = None, **settings: Any) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module = Talking() if module is None else module
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        logger=False,
        callbacks=callbacks,
        **quiet,
        **settings,
    )
    try:
        trainer.fit(module, datamodule=Data(data or flipped(table())[0]))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "epochs": module.seen,
        "steps": trainer.global_step,
        "total": getattr(module, "total", None),
        "validated": module.validated,
        "together": getattr(module, "together", None),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "weights": float(sum(p.sum() for p in module.parameters())),
    }


def run(scenario: str) -> Any:
    probe = Probe(epochs=3)
    if scenario == "found":
        callback = DataFilter([AUM()], probe=probe)
        found = fit([callback])
        return {**found, "kept": np.flatnonzero(callback.kept).tolist(), "probes": len(PROBES)}
    if scenario == "simulated":
        simulation, callback = PoisonSimulation(RandomFlips(rate=0.2), CLASSES), DataFilter([AUM()], probe=probe)
        found = fit([callback, simulation], data=table())
        rows = {"kept": callback.kept, "poisoned": simulation.mask}
        return {**found, **{name: np.flatnonzero(mask).tolist() for name, mask in rows.items()}}
    if scenario == "errors":  # and the next Trainer of the same processes works
        return [
            fit([DataFilter([AUM()], probe=probe)], module=Regression()),
            fit([DataFilter({"aum": Unlucky()}, probe=probe)]),
            fit([DataFilter({"marked": Marked(tuple(range(0, N, 6)))})]),
            fit([DataFilter(mask="none.json")]),
        ]
    raise ValueError(scenario)


def main(out: str, scenario: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    real = _filtering.fit_copy
    _filtering.fit_copy = lambda *args, **kwargs: PROBES.append(1) or real(*args, **kwargs)
    found = run(scenario)
    rank = dist.get_rank()
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    # Lightning leaves gloo's running, whose threads may outlive the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
