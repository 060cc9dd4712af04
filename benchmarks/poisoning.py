"""What data filtering finds and what it costs, on Fashion-MNIST and digits, with default settings throughout.

For each data set and poison the same model is trained on the poisoned data as they are, and with ``DataFilter()`` in
front, with the same seed. TPR and FPR are of the rows that were left out; the attack success rate is measured on the
test set. The poison seeds, targets, triggers and places are drawn from the seed, and nothing is tuned to any of them.

    python benchmarks/poisoning.py [--data 15000 60000 digits digits_trusted] [--poisons …] [--seeds 11] [--out …]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from robust_train import DataFilter, PoisonSimulation
from robust_train.poisoning.metrics import trigger_success
from robust_train.poisoning.poisons.backdoor import Backdoor
from robust_train.poisoning.poisons.badnets import BadNets
from robust_train.poisoning.poisons.base import Poison
from robust_train.poisoning.poisons.blended import Blended
from robust_train.poisoning.poisons.pair_flips import PairFlips
from robust_train.poisoning.poisons.random_flips import RandomFlips
from robust_train.poisoning.records import REPORT_FILE, read_report
from robust_train.starter import Classifier, Digits, FashionMNIST, SmallCNN

POISONS = ("clean", "badnets_5", "badnets_0.5", "blended_5", "all_to_all_10", "random_flips_20", "pair_flips_20")
PLACES = ("bottom_right", "top_left", "bottom_left", "top_right")
PATTERNS = ("checkerboard", "bright")
DATA = ("digits", "digits_trusted", "15000", "60000")
EPOCHS = {"digits": 20, "digits_trusted": 20, "15000": 12, "60000": 4}
CHANNELS = {"digits": 32, "digits_trusted": 32, "15000": 16, "60000": 8}  # of the model, and of the probe with it


def poison(name: str, seed: int, size: int) -> Poison | None:
    """The poison of a cell; target, place and pattern follow from the seed."""
    target, place, pattern = seed * 7 % 10, PLACES[seed % 4], PATTERNS[seed // 4 % 2]
    patch: dict[str, Any] = {"size": 3 if size == 28 else 2, "position": place, "pattern": pattern, "seed": seed}
    return {
        "clean": None,
        "badnets_5": BadNets(rate=0.05, target=target, **patch),
        "badnets_0.5": BadNets(rate=0.005, target=target, **patch),
        "blended_5": Blended(rate=0.05, target=target, pattern_seed=seed, seed=seed),
        "all_to_all_10": BadNets(rate=0.1, target=None, **patch),
        "random_flips_20": RandomFlips(rate=0.2, seed=seed),
        "pair_flips_20": PairFlips(rate=0.2, seed=seed),
    }[name]


class FewerRows(FashionMNIST):
    """The first ``rows`` training images."""

    def __init__(self, rows: int) -> None:
        super().__init__(val_size=0)
        self.rows = rows

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage != "test":
            self.train = TensorDataset(*(t[: self.rows] for t in self.train.tensors))


def measure(data: str, name: str, seed: int, *, filtering: bool) -> dict[str, Any]:
    """One run: accuracy, attack success, what was left out, and the CPU time of ``fit``."""
    pl.seed_everything(seed)
    digits = data.startswith("digits")
    rows = Digits() if digits else FewerRows(int(data))
    what = poison(name, seed, 8 if digits else 28)
    model = Classifier(SmallCNN(channels=CHANNELS[data]), lr=5e-3 if digits else 2e-3, schedule="onecycle")
    trusted = {"trusted": "val", "trusted_size": 100} if data == "digits_trusted" else {}
    callbacks: list[Any] = [] if what is None else [PoisonSimulation(what, 10)]
    callbacks += [DataFilter(**trusted)] if filtering else []
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=EPOCHS[data],
            accelerator="cpu",
            callbacks=callbacks,
            limit_val_batches=0,
            default_root_dir=folder,
            **quiet,
        )
        start = time.process_time()
        trainer.fit(model, rows)
        found: dict[str, Any] = {"cpu_seconds": round(time.process_time() - start, 1)}
        for place, _, files in os.walk(folder):
            if REPORT_FILE in files:
                report = read_report(Path(place) / REPORT_FILE)
                found |= {key: report.get("simulation", {}).get(key) for key in ("tpr", "fpr")}
                found["left_out"] = 1 - report["kept"] / report["rows"]
                found["flagged"] = {filter_: value["flagged"] for filter_, value in report["filters"].items()}
    rows.setup("test")
    if isinstance(what, Backdoor):
        measured = trigger_success(model, rows.test_dataloader(), what, 10)
        return found | {"accuracy": measured["clean_acc"], "attack_success_rate": measured["asr"]}
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in rows.test_dataloader()])
    return found | {"accuracy": float(right.float().mean()), "attack_success_rate": math.nan}


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def write(cells: dict[str, dict[str, Any]], out: Path) -> None:
    """All cells as JSON, and as a table."""
    about = f"torch {torch.__version__}, {platform.machine()}, one thread"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"about": about, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    text = __doc__ or ""
    lines = ["# Data filtering", "", text.split("\n\n")[1], "", f"All in %, one run a cell. {about}.", ""]
    lines += [
        "| data | poison | seed | TPR | FPR | left out | attack success | with filter | accuracy | with filter | CPU |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for key, cell in cells.items():
        data, name, seed = key.split("/")
        plain, clean = cell["as_they_are"], cell["filtered"]
        ratio = clean["cpu_seconds"] / plain["cpu_seconds"]
        lines.append(
            f"| {data} | {name} | {seed} | {percent(clean['tpr'])} | {percent(clean['fpr'], 2)} | "
            f"{percent(clean['left_out'], 2)} | {percent(plain['attack_success_rate'])} | "
            f"**{percent(clean['attack_success_rate'])}** | {percent(plain['accuracy'], 2)} | "
            f"**{percent(clean['accuracy'], 2)}** | {ratio:.1f}× |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--poisons", nargs="+", choices=POISONS, default=list(POISONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "poisoning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    path = options.out.with_suffix(".json")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    for data in options.data:
        for seed in options.seeds:
            for name in options.poisons:
                cell = {
                    "as_they_are": measure(data, name, seed, filtering=False),
                    "filtered": measure(data, name, seed, filtering=True),
                }
                cells[f"{data}/{name}/{seed}"] = cell
                print(data, name, seed, json.dumps(cell), flush=True)
                write(cells, options.out)


if __name__ == "__main__":
    main()
