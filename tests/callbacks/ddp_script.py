"""Run by test_ddp.py in two processes: trains, and writes what each rank ended with to ``<out>.<rank>``."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from foreign.batches import TupleBatch  # noqa: E402
from foreign.cases import CASES  # noqa: E402
from foreign.data import image_columns  # noqa: E402
from foreign.runs import make_trainer, seed_all  # noqa: E402

from robust_train import (  # noqa: E402
    AWP,
    PGD,
    TRADES,
    AdversarialTraining,
    CatastrophicOverfitting,
    ExtraData,
    FreeLB,
    FreeTraining,
    GradAlign,
    HelperTraining,
    RobustEvaluation,
    RobustOverfitting,
    Threat,
)

STARTS = []


class Watching(PGD):
    def perturb(self, victim, x, threat, generator):
        STARTS.append(float(threat.random_start(torch.full((4,), 0.5), generator.clone_state()).sum()))
        return super().perturb(victim, x, threat, generator)


class Grouped(TupleBatch):
    """With a parameter that the loss does not use, and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Sharded(TupleBatch):
    """Each rank holds a part of every weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[1], self.net[3], self.net):
            fully_shard(layer, mesh=mesh)


OWN = {"unused": Grouped, "sharded": Sharded}


def callbacks(what: str, eps: float) -> list[pl.Callback]:
    attack, threat = Watching(steps=2), Threat(eps=eps)
    evaluation = RobustEvaluation(PGD(steps=2), Threat(eps=0.1))
    return {
        "plain": [],
        "pgd_at": [AdversarialTraining(attack, threat)],
        "batch_mode": [AdversarialTraining(attack, threat, mode="batch")],
        "train_mode": [AdversarialTraining(attack, threat, mode="train")],
        "trades": [AdversarialTraining(attack, threat, TRADES())],
        "awp": [AdversarialTraining(attack, threat, AWP(gamma=0.05))],
        "free_lb": [AdversarialTraining(attack, threat, FreeLB(), mode="train")],
        "layer": [AdversarialTraining(attack, Threat(eps=eps, low=-math.inf, high=math.inf), layer="net.0")],
        "grad_align": [AdversarialTraining(attack, threat, GradAlign())],
        "free": [FreeTraining(threat, replays=2)],
        "helper": [HelperTraining(attack, threat, epochs=1)],
        "extra": [AdversarialTraining(attack, threat), ExtraData(TensorDataset(image_columns(30, 5)[0]), epochs=1)],
        "watched": [
            AdversarialTraining(attack, threat),
            evaluation,
            CatastrophicOverfitting(PGD(steps=2), gap=0.9),
            RobustOverfitting(batches=1),
        ],
        "evaluation": [evaluation],
        "both": [AdversarialTraining(attack, threat), evaluation],
    }[what]


def main(out: str, module: str, what: str, eps: str, settings: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_all(0)
    case = CASES.get(module, CASES["tuple"])
    net = OWN[module]() if module in OWN else case.module()
    options = json.loads(settings)
    kind = ModelParallelStrategy if module == "sharded" else DDPStrategy
    strategy = kind(process_group_backend="gloo", **options.pop("strategy", {}))
    trainer = make_trainer(
        pl.Trainer, *callbacks(what, float(eps)), strategy=strategy, devices=2, max_epochs=1, **options
    )
    trainer.fit(net, **case.data())
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    weights = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in net.state_dict().items()}
    found = {"weights": weights, "metrics": metrics, "starts": STARTS, "steps": trainer.global_step}
    torch.save(found, f"{out}.{trainer.global_rank}")
    # Lightning leaves gloo's running, whose threads may outlive the interpreter
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
