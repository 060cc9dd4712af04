"""What the callback costs on top of the work itself: PGD-AT through Lightning against a loop written by hand.

Three programs do the same work on the same batches: PGD-10 with a random start on the model in eval mode, then one
training step on the result. (1) a plain PyTorch loop; (2) Lightning with the attack written by hand into
``training_step``; (3) Lightning with an ordinary ``training_step`` and ``AdversarialTraining``. They take turns in one
process, on one thread, and CPU time is counted, so that only ratios matter.

    python benchmarks/overhead.py [--repeats 7] [--batches 20] [--size 28] [--batch-size 128]
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
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from robust_train import PGD, AdversarialTraining, Threat
from robust_train.starter.small_cnn import SmallCNN

EPS, STEPS = 0.1, 10
ALPHA = 2.5 * EPS / STEPS


def craft(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The attack as one writes it by hand: eval mode, frozen parameters, gradients of the input only."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + ALPHA * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - EPS), x + EPS).clamp(0, 1)
    for p in model.parameters():
        p.requires_grad_(True)
    model.train()
    return x_adv


class Ordinary(pl.LightningModule):
    """A module whose author never heard of adversaries."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallCNN(channels=16)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class ByHand(Ordinary):
    """The same with the attack written into the step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((craft(self, x, y), y), batch_idx)


def trainer(callbacks: list) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def cpu_seconds(program) -> float:
    start = time.process_time()
    program()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    n = arguments.batches * arguments.batch_size
    data = TensorDataset(torch.rand(n, 1, arguments.size, arguments.size), torch.randint(0, 10, (n,)))
    loader = DataLoader(data, batch_size=arguments.batch_size)

    def plain_loop() -> None:
        model = Ordinary()
        optimizer = model.configure_optimizers()
        for x, y in loader:
            x_adv = craft(model, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()

    def with_callback() -> None:
        trainer([AdversarialTraining(PGD(STEPS), Threat(eps=EPS))]).fit(Ordinary(), loader)

    programs = {
        "plain PyTorch loop": plain_loop,
        "Lightning, attack by hand": lambda: trainer([]).fit(ByHand(), loader),
        "Lightning, callback": with_callback,
        "Lightning, no attack": lambda: trainer([]).fit(Ordinary(), loader),
    }
    for program in programs.values():
        program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(arguments.repeats):
        for name, program in programs.items():
            seconds[name].append(cpu_seconds(program))
    loop = statistics.median(seconds["plain PyTorch loop"])
    rows = {
        name: {
            "median_s": round(statistics.median(times), 4),
            "min_s": round(min(times), 4),
            "ratio_to_loop": round(statistics.median(times) / loop, 4),
            "ratio_of_minima": round(min(times) / min(seconds["plain PyTorch loop"]), 4),
        }
        for name, times in seconds.items()
    }
    width = max(map(len, rows))
    size = f"{arguments.batch_size}x1x{arguments.size}x{arguments.size}"
    print(f"PGD-{STEPS} training, {arguments.batches} batches of {size}")
    for name, row in rows.items():
        ratios = f"x{row['ratio_to_loop']:.3f} (minima x{row['ratio_of_minima']:.3f})"
        print(f"{name:<{width}}  {row['median_s']:8.3f} CPU-s  {ratios}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": 1, "machine": platform.machine()}
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    report = {"command": "python benchmarks/overhead.py", "settings": settings, "machine": machine, "results": rows}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
