"""Ways of adversarial training on Fashion-MNIST, Linf eps 0.1, judged by PGD-50 and AutoAttack at official counts.

SmallCNN (16 channels), one-cycle learning rate, the same number of epochs for all. Of each run the epoch is kept whose
robust accuracy (PGD-10) is highest on 5,000 training images that were held out; the test set is looked at once, at the
end: PGD-50 on all of it, AutoAttack (standard version) on its first 1,000 images with the exact 95 % interval. Cost is
the time of training over that of ``standard``.

Everything is resumable: the same line again goes on where it was stopped, AutoAttack in shards of 100 images.

    python benchmarks/fashion_mnist_robust.py [--recipes …] [--seeds 0] [--epochs 8] [--folder runs/…]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train import PGD, AutoAttack, RobustEvaluation, Threat, evaluate, recipe
from robust_train.starter import Classifier, FashionMNIST, SmallCNN

EPS, CHANNELS, FIRST, SHARD = 0.1, 16, 1000, 100
RECIPES = ("standard", "fgsm_rs", "n_fgsm", "pgd_at", "trades", "mart", "alp")


def network(epochs: int) -> Classifier:
    return Classifier(SmallCNN(channels=CHANNELS), lr=2e-3, schedule="onecycle")


def trained(name: str, seed: int, epochs: int, folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """The model of a cell, from disk if it was trained before."""
    done = folder / "training.json"
    if not done.is_file():
        pl.seed_everything(seed)
        threat = Threat(eps=EPS)
        best = ModelCheckpoint(folder, "best", monitor="val/robust_acc", mode="max", auto_insert_metric_name=False)
        defences = recipe(name, f"threat.eps={EPS}", "callbacks.robust_evaluation=null")
        trainer = pl.Trainer(
            max_epochs=epochs,
            devices=1,
            callbacks=[*defences, RobustEvaluation({"pgd": PGD(10)}, threat, limit_batches=10), best],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        validating = 0.0

        class Watch(pl.Callback):
            def on_validation_start(self, *_: Any) -> None:
                self.start = time.process_time()

            def on_validation_end(self, *_: Any) -> None:
                nonlocal validating
                validating += time.process_time() - self.start

        trainer.callbacks.append(Watch())  # type: ignore[attr-defined]
        start, wall = time.process_time(), time.perf_counter()
        trainer.fit(network(epochs), FashionMNIST(val_size=5000))
        times = {
            "train_cpu_seconds": round(time.process_time() - start - validating, 1),
            "wall_seconds": round(time.perf_counter() - wall, 1),
            "val_robust_acc": float(best.best_model_score or 0.0),
        }
        done.write_text(json.dumps(times), encoding="utf-8")
    model = network(epochs)
    model.load_state_dict(torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"])
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), json.loads(done.read_text(encoding="utf-8"))


def judged(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Clean accuracy and PGD-50 on the whole test set, AutoAttack on its first images."""
    data = FashionMNIST()
    data.setup("test")
    rows = data.test.tensors
    first = TensorDataset(*(t[:FIRST] for t in rows))
    threat = Threat(eps=EPS)
    pgd = evaluate(model, DataLoader(TensorDataset(*rows), 500), threat, {"pgd": PGD(50)}, shards=folder / "pgd")
    strongest = evaluate(model, DataLoader(first, SHARD), threat, {"autoattack": AutoAttack()}, shards=folder / "aa")
    found = {"clean_acc": pgd.rates["clean_acc"], "pgd": pgd.rates["robust_acc"], "aa": strongest.rates["robust_acc"]}
    flags = sorted({flag.name for flag in (*pgd.flags, *strongest.flags)})
    return {name: rate.as_dict() for name, rate in found.items()} | {"flags": flags}


def write(cells: dict[str, dict[str, Any]], epochs: int, out: Path) -> None:
    """All cells as JSON, and as a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, one thread"
    about = f"torch {torch.__version__}, {device}, {epochs} epochs"
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "cells": cells}, indent=1) + "\n"
    out.with_suffix(".json").write_text(text, encoding="utf-8")
    intro = "\n\n".join((__doc__ or "").split("\n\n")[:2])
    lines = ["# Adversarial training on Fashion-MNIST", "", intro, "", f"{about}.", ""]
    lines += ["| recipe | seed | clean | PGD-50 | AutoAttack, first 1,000 [95 %] | cost |", "|---|---|---|---|---|---|"]
    unit = {key.split("/")[1]: c["train_cpu_seconds"] for key, c in cells.items() if key.startswith("standard/")}
    for key, cell in cells.items():
        name, seed = key.split("/")
        base = unit.get(seed) or next(iter(unit.values()), None)
        cost = "–" if base is None else f"{cell['train_cpu_seconds'] / base:.1f}"
        clean, pgd, strongest = cell["clean_acc"], cell["pgd"], cell["aa"]
        lines.append(
            f"| `{name}` | {seed} | {100 * clean['value']:.1f} | {100 * pgd['value']:.1f} | "
            f"**{100 * strongest['value']:.1f}** [{100 * strongest['low']:.1f}, {100 * strongest['high']:.1f}] "
            f"| {cost} |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("runs/fashion_mnist_robust"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fashion_mnist_robust")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    path = options.out.with_suffix(".json")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    for seed in options.seeds:
        for name in options.recipes:
            folder = options.folder / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            model, times = trained(name, seed, options.epochs, folder)
            cells[f"{name}/{seed}"] = cell = {**times, **judged(model, folder)}
            print(name, seed, json.dumps(cell), flush=True)
            write(cells, options.epochs, options.out)


if __name__ == "__main__":
    main()
