"""What the callback costs on top of the work itself: PGD-AT through Lightning against a loop written by hand.

Three programs do the same work on the same batches: PGD-10 with a random start on the model in eval mode, then one
training step on the result. (1) a plain PyTorch loop; (2) Lightning with the attack written by hand into
``training_step``; (3) Lightning with an ordinary ``training_step`` and ``AdversarialTraining``. They take turns in one
process, on one thread; CPU time is counted from the start of one batch to the start of the next, and medians over all
batches are compared, so that only ratios matter. glibc is told to keep freed memory: otherwise page faults, which
depend on the accidents of allocation, cost up to a third of the time and drown what is measured.

    python benchmarks/overhead.py [--repeats 12] [--batches 6] [--size 28] [--batch-size 128]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
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


class Clock(pl.Callback):
    """CPU time at the start of each batch."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args) -> None:
        self.starts.append(time.process_time())


def periods(starts: list[float]) -> list[float]:
    """Seconds from each start to the next; the first batch, which warms up, is left out."""
    return [after - before for before, after in zip(starts[1:], starts[2:], strict=False)]


KEEP_MEMORY = {f"MALLOC_{name}_": str(2**32) for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD")}
KEEP_MEMORY["MALLOC_TOP_PAD_"] = str(2**28)


def main() -> None:
    if any(name not in os.environ for name in KEEP_MEMORY):  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)  # noqa: S606
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--batches", type=int, default=6)
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

    def plain_loop() -> list[float]:
        model, starts = Ordinary(), []
        optimizer = model.configure_optimizers()
        for x, y in loader:
            starts.append(time.process_time())
            x_adv = craft(model, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()
        return periods(starts)

    def lightning(model: type[Ordinary], *callbacks: pl.Callback) -> list[float]:
        clock = Clock()
        trainer([clock, *callbacks]).fit(model(), loader)
        return periods(clock.starts)

    programs = {
        "plain PyTorch loop": plain_loop,
        "Lightning, attack by hand": lambda: lightning(ByHand),
        "Lightning, callback": lambda: lightning(Ordinary, AdversarialTraining(PGD(STEPS), Threat(eps=EPS))),
        "Lightning, no attack": lambda: lightning(Ordinary),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(arguments.repeats + 1):
        order = list(programs) if i % 2 else list(reversed(programs))
        for name in order:
            times = programs[name]()
            if i:  # the first round warms up
                seconds[name] += times
    loop, by_hand = (statistics.median(seconds[name]) for name in list(programs)[:2])
    rows = {
        name: {
            "batches": len(times),
            "median_ms": round(1e3 * statistics.median(times), 3),
            "ratio_to_loop": round(statistics.median(times) / loop, 4),
            "ratio_to_lightning_by_hand": round(statistics.median(times) / by_hand, 4),
        }
        for name, times in seconds.items()
    }
    width = max(map(len, rows))
    size = f"{arguments.batch_size}x1x{arguments.size}x{arguments.size}"
    print(f"PGD-{STEPS} training, {arguments.batches} batches of {size}")
    for name, row in rows.items():
        ratios = (
            f"x{row['ratio_to_loop']:.3f} of the loop, x{row['ratio_to_lightning_by_hand']:.3f} of Lightning by hand"
        )
        print(f"{name:<{width}}  {row['median_ms']:9.2f} CPU-ms a batch  {ratios}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": 1, "machine": platform.machine()}
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    report = {"command": "python benchmarks/overhead.py", "settings": settings, "machine": machine, "results": rows}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
