"""Every shipped recipe on scikit-learn's digits, three seeds, judged by torchattacks.

8x8 pixels, Linf eps 0.2, SmallCNN with BatchNorm and dropout, 30 epochs, the fixed test split of 450 images. The judges
are torchattacks' PGD with 50 steps and APGD (cross-entropy) with 50 steps; "worst" counts an image only if it survives
both.

    python benchmarks/digits.py [--seeds 0 1 2] [--out benchmarks/results/digits]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch

from robust_train import RobustEvaluation, Threat, TorchAttack, recipe
from robust_train.starter import Classifier, Digits, SmallCNN

EPS, EPOCHS = 0.2, 30
RUNS = [("standard", 16), ("pgd_at", 16), ("trades", 16), ("standard", 32), ("pgd_at", 32), ("trades", 32)]
RUNS += [("fgsm_rs", 32), ("n_fgsm", 32)]
METRICS = {"clean_acc": "clean", "robust_acc_pgd": "PGD-50", "robust_acc_apgd": "APGD-50", "robust_acc": "worst"}


def measure(name: str, channels: int, seed: int) -> dict[str, float]:
    """Train one model and judge it."""
    pl.seed_everything(seed)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    model = Classifier(SmallCNN(channels=channels), lr=5e-3, schedule="cosine")  # conf/model/small_cnn.yaml
    data = Digits()
    defences = recipe(name, f"threat.eps={EPS}", "callbacks.robust_evaluation=null")
    start = time.process_time()
    pl.Trainer(max_epochs=EPOCHS, callbacks=defences, limit_val_batches=0, **quiet).fit(model, data)
    seconds = time.process_time() - start
    judges = {"pgd": TorchAttack("PGD", {"steps": 50}), "apgd": TorchAttack("APGD", {"steps": 50})}
    judge = pl.Trainer(callbacks=[RobustEvaluation(judges, Threat(eps=EPS))], **quiet)
    found = judge.test(model, data, verbose=False)[0]
    return {key: found[f"test/{key}"] for key in METRICS} | {"train_cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)

    rows, lines = [], [f"| recipe | channels | {' | '.join(METRICS.values())} | training CPU-s |"]
    lines.append("|---" * (len(METRICS) + 3) + "|")
    for name, channels in RUNS:
        each = [measure(name, channels, seed) for seed in arguments.seeds]
        rows.append({"recipe": name, "channels": channels, "seeds": dict(zip(arguments.seeds, each, strict=True))})
        cells = []
        for key in METRICS:
            values = [100 * m[key] for m in each]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        cells.append(f"{statistics.mean(m['train_cpu_seconds'] for m in each):.0f}")
        lines.append(f"| `{name}` | {channels}–{2 * channels} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    report = {"command": "python benchmarks/digits.py", "eps": EPS, "epochs": EPOCHS, "machine": machine, "runs": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    heading = f"# Digits, Linf eps {EPS}, {EPOCHS} epochs, 450 test images, seeds {arguments.seeds}\n\n"
    heading += "Mean (smallest–largest) in %. Made by `python benchmarks/digits.py`; the judges are torchattacks'.\n\n"
    arguments.out.with_suffix(".md").write_text(heading + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
