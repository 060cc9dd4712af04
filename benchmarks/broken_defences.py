"""Three defences that do not defend, on scikit-learn's digits: a naive evaluation beside an adaptive one.

Saturated scores (the logits times 1000), random resizing and padding, and quantised inputs. Each is a small network
behind or before one broken step, trained with cross-entropy; no defence makes it more robust. The naive attack is PGD
with 50 steps on the loss as it is, one draw a verdict. The adaptive attack is the one that the flag asks for.

    python benchmarks/broken_defences.py [--seeds 0 1 2] [--out benchmarks/results/broken_defences]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robust_train import APGD, BPDA, EOT, PGD, Attack, Evaluation, Square, Threat, WorstCase, evaluate

EPS, ROWS, DRAWS = 0.15, 500, 20


class Saturated(nn.Module):
    """Scores so far apart that the cross-entropy of every right example is 0 in float32, and so is its gradient."""

    def forward(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class RandomResizing(nn.Module):
    """Shrunk to a random size, put at a random place on black (Xie et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        size = int(torch.randint(side - 2, side + 1, ()))
        top, left = (int(torch.randint(0, side - size + 1, ())) for _ in range(2))
        small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        return F.pad(small, (left, side - size - left, top, side - size - top))


class Quantised(nn.Module):
    """Five grey levels (Xu et al. 2018: feature squeezing)."""

    def forward(self, x: Tensor) -> Tensor:
        return (4 * x).round() / 4


@dataclass(frozen=True)
class Case:
    """A broken defence: its step, whether that comes after the network, its flag, and the attack that knows of it."""

    step: type[nn.Module]
    after: bool
    flag: str
    adaptive: Attack
    draws: int = 1


CASES = {
    "saturated scores": Case(
        Saturated, True, "zero_gradients", WorstCase([APGD(50, loss="dlr"), PGD(50, targeted="next")])
    ),
    "random resizing": Case(RandomResizing, False, "randomised_outputs", EOT(PGD(50), DRAWS), DRAWS),
    "quantised inputs": Case(Quantised, False, "zero_gradients", WorstCase([BPDA(PGD(50)), Square(500)])),
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    return x[:-ROWS], y[:-ROWS], x[-ROWS:], y[-ROWS:]


def trained(case: Case, seed: int, epochs: int = 20) -> nn.Sequential:
    """A small network with the broken step, trained with cross-entropy; a step behind the network comes when it is."""
    x, y, _, _ = digits()
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    model = network if case.after else nn.Sequential(case.step(), *network)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return (nn.Sequential(*network, case.step()) if case.after else model).eval()


def measured(case: Case, model: nn.Module, rows: int = ROWS) -> tuple[Evaluation, Evaluation]:
    """The naive evaluation and the adaptive one, on the first test images."""
    _, _, x, y = digits()
    loader = [(x[i : i + 100], y[i : i + 100]) for i in range(0, rows, 100)]
    naive = evaluate(model, loader, Threat(eps=EPS), {"pgd": PGD(50)}, draws=1)
    adaptive = evaluate(model, loader, Threat(eps=EPS), {"adaptive": case.adaptive}, draws=case.draws)
    return naive, adaptive


def kept(evaluation: Evaluation) -> dict[str, Any]:
    """What the report says of an evaluation."""
    return {key: value for key, value in evaluation.as_dict().items() if key in ("n", "draws", "rates", "flags")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "broken_defences")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = "| defence | clean | naive PGD-50 | adaptive | flags of the naive evaluation | CPU-s |"
    runs, lines = [], [head, "|---|---:|---:|---:|---|---:|"]
    for name, case in CASES.items():
        each, start = [], time.process_time()
        for seed in arguments.seeds:
            naive, adaptive = measured(case, trained(case, seed))
            each.append({"seed": seed, "naive": kept(naive), "adaptive": kept(adaptive)})
        seconds = (time.process_time() - start) / len(each)
        cells = []
        for part, key in (("naive", "clean_acc"), ("naive", "robust_acc"), ("adaptive", "robust_acc")):
            values = [100 * run[part]["rates"][key]["value"] for run in each]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})")
        flags = {flag["name"]: None for run in each for flag in run["naive"]["flags"]}
        always = [flag for flag in flags if all(flag in [f["name"] for f in run["naive"]["flags"]] for run in each)]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(f'`{flag}`' for flag in always)} | {seconds:.0f} |")
        print(lines[-1], flush=True)
        runs.append({"defence": name, "adaptive": str(case.adaptive), "draws": case.draws, "seeds": each})
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    report = {"command": "python benchmarks/broken_defences.py", "eps": EPS, "rows": ROWS, "machine": machine}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "runs": runs}, indent=2) + "\n"
    arguments.out.with_suffix(".json").write_text(text, encoding="utf-8")
    heading = f"# Broken defences on digits, Linf eps {EPS}, {ROWS} test images, seeds {arguments.seeds}\n\n"
    heading += "Accuracy in %, mean (smallest–largest); flags that every seed raised. Made by\n"
    heading += "`python benchmarks/broken_defences.py`. Random resizing: the adaptive verdict is the mean of "
    heading += f"{DRAWS} draws. CPU-s: training and both evaluations, one seed.\n\n"
    arguments.out.with_suffix(".md").write_text(heading + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
