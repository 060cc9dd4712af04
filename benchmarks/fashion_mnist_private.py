"""Accuracy on Fashion-MNIST under differential privacy: epsilon <= 3 at delta 1e-5.

True Poisson sampling, PRV accountant, all 60,000 training images, the last iterate, the 10,000 test images looked at
once for each run. ``linear`` is the recipe ``dp_scatter``, whose settings were chosen on training images that were held
out; ``cnn`` is a small network with tanh, trained end to end with the settings that Tramèr and Boneh published.

    python benchmarks/fashion_mnist_private.py [--runs linear cnn] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import opacus
import pytorch_lightning as pl
import torch

from robust_train import DPSGD
from robust_train.starter import Classifier, FashionMNIST, TanhCNN, WaveletFeatures, WaveletLinear

EPSILON, DELTA, SIZE, EPOCHS = 3.0, 1e-5, 60_000, 40
BATCH = {"linear": 8192, "cnn": 2048}
LR = {"linear": 16.0, "cnn": 4.0}
ROWS = {"linear": 2048, "cnn": 512}


def measure(run: str, seed: int, features: WaveletFeatures, data: FashionMNIST) -> dict[str, Any]:
    """Train one model and test its last iterate."""
    pl.seed_everything(seed)
    network = WaveletLinear(features) if run == "linear" else TanhCNN()
    model = Classifier(network, lr=LR[run], optimizer="sgd", momentum=0.9)
    private = DPSGD(
        target_epsilon=EPSILON,
        target_delta=DELTA,
        max_grad_norm=0.1,
        sample_rate=BATCH[run] / SIZE,
        dataset_size=SIZE,
        physical_batch_size=ROWS[run],
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:  # for the certificate
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", callbacks=[private], default_root_dir=folder, **quiet
        )
        trainer.fit(model, train_dataloaders=data.train_dataloader())
    seconds = time.process_time() - start
    accuracy = trainer.test(model, data.test_dataloader(), verbose=False)[0]["test/acc"]
    ((noise, rate, steps),) = private.history
    return {
        "accuracy": accuracy,
        "epsilon": private.epsilon(),
        "noise_multiplier": noise,
        "sample_rate": rate,
        "steps": steps,
        "cpu_seconds": round(seconds, 1),
    }


def write(found: dict[str, dict[str, dict[str, Any]]], out: Path) -> None:
    """All runs as JSON, and their means as a table."""
    about = f"torch {torch.__version__}, opacus {opacus.__version__}, {platform.machine()}, one thread"
    out.with_suffix(".json").write_text(
        json.dumps({"about": about, "delta": DELTA, "runs": found}, indent=2) + "\n", encoding="utf-8"
    )
    lines = [f"# Fashion-MNIST at epsilon <= {EPSILON:g}, delta {DELTA:g}", "", __doc__.split("\n\n")[1], "", about, ""]
    lines += ["| run | test accuracy, mean (each seed) | epsilon | noise multiplier | steps | CPU-s a run |"]
    lines += ["|---|---|---|---|---|---|"]
    for run, seeds in found.items():
        each = list(seeds.values())
        mean, first = statistics.mean(r["accuracy"] for r in each), each[0]
        single = ", ".join(f"{100 * r['accuracy']:.2f}" for r in each)
        lines.append(
            f"| {run} | **{100 * mean:.2f} %** ({single}) | {max(r['epsilon'] for r in each):.4f} | "
            f"{first['noise_multiplier']:.3f} | {first['steps']} | "
            f"{statistics.mean(r['cpu_seconds'] for r in each):.0f} |"
        )
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=list(BATCH), default=list(BATCH))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="benchmarks/results/fashion_mnist_private")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    features = WaveletFeatures()
    out = Path(options.out).with_suffix(".json")
    found = json.loads(out.read_text())["runs"] if out.is_file() else {}
    for run in options.runs:
        data = FashionMNIST(batch_size=BATCH[run], val_size=0, features=features if run == "linear" else None)
        start = time.process_time()
        data.setup()
        prepared = round(time.process_time() - start, 1)
        found[run] = {}
        for seed in options.seeds:
            found[run][str(seed)] = {**measure(run, seed, features, data), "features_cpu_seconds": prepared}
            print(run, seed, found[run][str(seed)], flush=True)
    write(found, Path(options.out))


if __name__ == "__main__":
    main()
