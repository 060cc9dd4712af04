"""AutoAttack, standard version, beside its authors' own code: verdicts and time, example by example.

One undefended and one adversarially trained SmallCNN on Fashion-MNIST, Linf eps 0.1, the first test images. Both
implementations get the same model, images, batch size and official counts (APGD 100 steps, targeted APGD and FAB 9 x
100, Square 5000 queries), one thread, one after the other. The starts and squares are random, so that a few examples at
the edge may differ; "reference, another seed" shows how many do between two runs of the reference alone. The
time ratio is the reference's over ours.

    pip install --no-deps pyautoattack
    python benchmarks/autoattack.py [--rows 200] [--seeds 0] [--out benchmarks/results/autoattack]
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
from torch import Tensor, nn

from robust_train import AutoAttack, ClassifierVictim, Threat, recipe
from robust_train.starter import Classifier, FashionMNIST, SmallCNN

EPS, BATCH, CHANNELS = 0.1, 250, 16
MODELS = {"undefended": ("standard", 2), "adversarially trained": ("fgsm_rs", 4)}


def trained(name: str, epochs: int) -> nn.Module:
    """A model by one of our recipes, in eval mode."""
    pl.seed_everything(0)
    model = Classifier(SmallCNN(channels=CHANNELS), lr=2e-3, schedule="onecycle")
    callbacks = recipe(name, f"threat.eps={EPS}", "callbacks.robust_evaluation=null")
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, FashionMNIST(val_size=5000))
    return model.eval()


def ours(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, dict[str, int]]:
    """Which examples stand ``(N,)``, and how many after each attack."""
    counts: dict[str, int] = {}
    found = []
    for i in range(0, len(x), BATCH):
        rows = slice(i, i + BATCH)
        victim = ClassifierVictim(model, y[rows], stop_when_fooled=True)
        generator = torch.Generator().manual_seed(seed)
        adversarial, stood = AutoAttack().survivors(victim, x[rows], Threat(eps=EPS), generator)
        counts = {name: counts.get(name, 0) + number for name, number in stood.items()}
        found.append(adversarial)
    return standing(model, torch.cat(found), x, y), counts


def reference(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Which examples stand ``(N,)`` after the authors' code."""
    from pyautoattack import AutoAttack as Reference

    attack = Reference(model, norm="Linf", eps=EPS, version="standard", seed=seed, device="cpu")
    found: Any = attack.run_standard_evaluation(x, y, batch_size=BATCH)
    return standing(model, found[0] if isinstance(found, tuple) else found, x, y)


def standing(model: nn.Module, adversarial: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Right at the adversarial input, or outside of the ball or of the pixels' range; ``(N,)``."""
    outside = ((adversarial - x).abs() > EPS + 1e-6) | (adversarial < 0) | (adversarial > 1)
    with torch.no_grad():
        return (model(adversarial).argmax(1) == y) | outside.flatten(1).any(1)


def timed(call: Any, *arguments: Any) -> tuple[Any, float]:
    start = time.process_time()
    result = call(*arguments)
    return result, time.process_time() - start


def compare(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Both on the same rows."""
    (own, counts), seconds = timed(ours, model, x, y, seed)
    want, their_seconds = timed(reference, model, x, y, seed)
    again = reference(model, x, y, seed + 1)
    return {
        "rows": len(x),
        "counts": counts,
        "ours": int(own.sum()),
        "reference": int(want.sum()),
        "differ": int((own != want).sum()),
        "differ_between_seeds_of_the_reference": int((again != want).sum()),
        "cpu_seconds": round(seconds, 1),
        "reference_cpu_seconds": round(their_seconds, 1),
    }


def write(cells: dict[str, dict[str, Any]], out: Path) -> None:
    """All cells as JSON, and as a table."""
    about = f"torch {torch.__version__}, {platform.machine()}, one thread"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"about": about, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    lines = ["# AutoAttack beside its authors' code", "", (__doc__ or "").split("\n\n")[1], "", f"{about}.", ""]
    lines += [
        "| model | seed | rows | ours stand | reference | differ | reference, another seed | time, reference / ours |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for key, cell in cells.items():
        name, _, seed = key.rpartition("/")
        lines.append(
            f"| {name} | {seed} | {cell['rows']} | {cell['ours']} | {cell['reference']} | {cell['differ']} | "
            f"{cell['differ_between_seeds_of_the_reference']} | "
            f"**{cell['reference_cpu_seconds'] / cell['cpu_seconds']:.1f}** |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoattack")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    data = FashionMNIST()
    data.setup("test")
    x, y = (t[: options.rows] for t in data.test.tensors)
    cells: dict[str, dict[str, Any]] = {}
    for kind, (name, epochs) in MODELS.items():
        model = trained(name, epochs)
        for seed in options.seeds:
            cells[f"{kind}/{seed}"] = cell = compare(model, x, y, seed)
            print(kind, seed, json.dumps(cell), flush=True)
            write(cells, options.out)


if __name__ == "__main__":
    main()
