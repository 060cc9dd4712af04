"""What a private step costs on top of an ordinary one: our engines beside Opacus', on four models.

A step is ``zero_grad``, forward, backward, clipping, noise, and SGD. The programs take turns, a step each, in one
process and on one thread; CPU time is counted, and medians are compared, so that only ratios matter. glibc is told
to keep freed memory: otherwise page faults drown what is measured.

    python benchmarks/privacy_engines.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import opacus
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.engines.base import Engine
from robust_train.privacy.engines.book_keeping import BookKeeping
from robust_train.privacy.engines.hooks import Hooks

NOISE, BOUND = 1.0, 1.0
Step = Callable[[Tensor, Tensor], None]


class Attention(nn.Module):
    """Causal self-attention of layers that Opacus knows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.inward, self.outward = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.inward(x).chunk(3, -1))
        return self.outward(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norms = Attention(width, heads), nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.perceptron(self.norms[1](x))


class Transformer(nn.Module):
    """Predicts the next of 512 tokens at each of 64 positions."""

    def __init__(self, width: int = 128, depth: int = 4, tokens: int = 512, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        return self.head(self.blocks(self.tokens(ids) + self.positions(places))).transpose(1, 2)


def small_convnet() -> nn.Module:
    """The network of Papernot et al. and Tramer and Boneh for images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, 2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Conv2d(16, 32, 4, 2), nn.Tanh(),
        nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def conv_group_norm() -> nn.Module:
    def block(inward: int, outward: int) -> list[nn.Module]:
        return [nn.Conv2d(inward, outward, 3, padding=1), nn.GroupNorm(8, outward), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(3, 32), *block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "small convnet, 256 x 1x28x28": (small_convnet, lambda: (torch.rand(256, 1, 28, 28), torch.randint(10, (256,)))),
    "conv + GroupNorm, 64 x 3x32x32": (conv_group_norm, lambda: (torch.rand(64, 3, 32, 32), torch.randint(10, (64,)))),
    "MLP 784-512-256-10, 256 x 784": (perceptron, lambda: (torch.rand(256, 784), torch.randint(10, (256,)))),
    "transformer 4 x 128, 32 x 64": (
        Transformer,
        lambda: (torch.randint(512, (32, 64)), torch.randint(512, (32, 64))),
    ),
}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def ordinary(model: nn.Module) -> Step:
    optimizer = sgd(model)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def opacus_hooks(model: nn.Module) -> Step:
    wrapped, optimizer = GradSampleModule(model), sgd(model)

    def step(x: Tensor, y: Tensor) -> None:
        private.expected_batch_size = len(x)
        private.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        private.step()

    private = DPOptimizer(optimizer, noise_multiplier=NOISE, max_grad_norm=BOUND, expected_batch_size=1)
    return step


def opacus_ghost(model: nn.Module) -> Step:
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=BOUND)
    private = DPOptimizerFastGradientClipping(
        sgd(model), noise_multiplier=NOISE, max_grad_norm=BOUND, expected_batch_size=1
    )
    criterion = DPLossFastGradientClipping(wrapped, private, nn.CrossEntropyLoss())

    def step(x: Tensor, y: Tensor) -> None:
        private.expected_batch_size = len(x)
        private.zero_grad()
        output = wrapped(x)
        if output.dim() == 3:  # positions count as classes of their own otherwise
            output, y = output.transpose(1, 2), y
            criterion(output.flatten(0, 1), y.flatten(), shape=(*y.shape, output.shape[-1])).backward()
        else:
            criterion(output, y).backward()
        private.step()

    return step


def ours(kind: type[Engine]) -> Callable[[nn.Module], Step]:
    def make(model: nn.Module) -> Step:
        engine, optimizer = kind(model, list(model.parameters())), sgd(model)

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            engine.start()
            loss = F.cross_entropy(model(x), y)
            engine.arm()
            loss.backward()
            result = engine.clipped_sum(len(x), BOUND, Flat())
            engine.stop()
            for p, g in zip(engine.parameters, result.gradients, strict=True):
                p.grad = (g + torch.normal(0, NOISE * BOUND, g.shape)) / len(x)
            optimizer.step()

        return step

    return make


PROGRAMS: dict[str, Callable[[nn.Module], Step]] = {
    "not private": ordinary,
    "Opacus, hooks": opacus_hooks,
    "Opacus, ghost": opacus_ghost,
    "hooks": ours(Hooks),
    "book-keeping": ours(BookKeeping),
}
KEEP_MEMORY = {f"MALLOC_{name}_": str(2**32) for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD")}
KEEP_MEMORY["MALLOC_TOP_PAD_"] = str(2**28)


def measure(model: str, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each program's steps."""
    torch.manual_seed(0)
    make, draw = MODELS[model]
    template, batch = make(), draw()
    steps = {name: program(copy.deepcopy(template)) for name, program in PROGRAMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 2):
        for name in list(steps) if i % 2 else reversed(steps):
            start = time.process_time()
            steps[name](*batch)
            if i > 1:  # the first two rounds warm up
                seconds[name].append(time.process_time() - start)
    return seconds


def main() -> None:
    if any(name not in os.environ for name in KEEP_MEMORY):  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)  # noqa: S606
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="those whose names begin with one of these")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "privacy_engines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    for model in MODELS:
        if not model.startswith(tuple(arguments.models)):
            continue
        seconds = measure(model, arguments.repeats)
        base = statistics.median(seconds["not private"])
        results[model] = {
            name: {
                "median_ms": round(1e3 * statistics.median(times), 3),
                "ratio": round(statistics.median(times) / base, 3),
            }
            for name, times in seconds.items()
        }
        print(model, *(f"{name} x{row['ratio']:.2f}" for name, row in results[model].items()), sep="\n    ")
    machine = {"torch": torch.__version__, "opacus": opacus.__version__, "threads": 1, "machine": platform.machine()}
    report = {"command": "python benchmarks/privacy_engines.py", "repeats": arguments.repeats, "machine": machine}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report | {"results": results}, indent=2) + "\n"
    arguments.out.with_suffix(".json").write_text(text, encoding="utf-8")
    lines = [
        "# CPU time of a private training step, in multiples of an ordinary one",
        "",
        f"Medians of {arguments.repeats} steps on one thread, the programs taking turns. Made by "
        f"`{report['command']}`; torch {machine['torch']}, Opacus {machine['opacus']}.",
        "",
        "| model | Opacus, hooks | Opacus, ghost | our hooks | our book-keeping |",
        "|---|---|---|---|---|",
        *(
            f"| {model} | {' | '.join(str(row[name]['ratio']) for name in list(PROGRAMS)[1:])} |"
            for model, row in results.items()
        ),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
