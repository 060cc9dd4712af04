"""Engines beside what else torch does to a forward or backward pass."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from privacy.exact import assert_near, check, exact, gradients, recorded, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.engines.base import ClippedSum, RowsMismatch
from robust_train.privacy.engines.book_keeping import BookKeeping
from robust_train.privacy.engines.hooks import Hooks

every = pytest.mark.parametrize("kind", [BookKeeping, Hooks])


class Mixed(nn.Module):
    """Images to patches to words of attention, as a vision transformer in small."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(inplace=True))
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((words + self.block(words)).mean(1))

    def block(self, words: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(self.norm(words))))


def ce(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y)


def autocast(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=module.head.weight.dtype == torch.float32):
        return F.cross_entropy(module(x).float(), y)


@pytest.fixture
def net() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 1, 9, 9, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def clipped(kind, module: nn.Module, loss, batch: tuple[Tensor, ...]) -> ClippedSum:
    engine = kind(module, trained(module))
    recorded(engine, loss, batch)
    result = engine.clipped_sum(len(batch[0]), 0.5, Flat())
    engine.close()
    module.zero_grad()
    return result


@every
def test_bfloat16_autocast(kind, net, batch):
    singles = [
        torch.autograd.grad(autocast(net, *one), trained(net)) for one in zip(*(x.split(1) for x in batch), strict=True)
    ]
    rows = [torch.stack(each) for each in zip(*singles, strict=True)]
    assert_near(clipped(kind, net, autocast, batch), exact(rows, 0.5, Flat()), 0.01)


def test_bfloat16_autocast_changes_no_bit_of_the_outputs(net, batch):
    loss = autocast(net, *batch)
    engine = BookKeeping(net, trained(net))
    assert torch.equal(recorded(engine, autocast, batch), loss)


@every
def test_clipped_sums_within_autocast_are_told_in_float32(kind, net, batch):
    expected = clipped(kind, net, autocast, batch)
    engine = kind(net, trained(net))
    recorded(engine, autocast, batch)
    with torch.autocast("cpu", torch.bfloat16):
        result = engine.clipped_sum(6, 0.5, Flat())
    assert all(map(torch.equal, result.gradients, expected.gradients))
    assert torch.equal(result.norms, expected.norms)


@every
def test_precision_for_training_is_not_that_of_clipping(kind, net, batch):
    check(kind, net, ce, batch)
    torch.set_float32_matmul_precision("medium")
    try:
        engine, seen = kind(net, trained(net)), []

        class Watch(Flat):
            def factors(self, norms: Tensor, bound: float) -> Tensor:
                seen.append(torch.backends.cuda.matmul.fp32_precision)
                return super().factors(norms, bound)

        recorded(engine, ce, batch)
        engine.clipped_sum(6, 0.5, Watch())
        assert seen == ["ieee"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@every
def test_bfloat16_parameters(kind, net, batch):
    net.bfloat16()
    check(kind, net, ce, (batch[0].bfloat16(), batch[1]), tolerance=0.05)


@every
def test_bfloat16_modules_with_layers_without_a_rule(kind):
    torch.manual_seed(0)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.factor = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor + self.shift).tanh()

    net = nn.Sequential(nn.Linear(4, 4), Shifted(), nn.Linear(4, 3)).bfloat16()
    check(kind, net, ce, (torch.randn(6, 4).bfloat16(), torch.arange(6) % 3), tolerance=0.05)


@every
def test_float64_modules(kind, net, batch):
    check(kind, net.double(), ce, (batch[0].double(), batch[1]), tolerance=1e-12)


@every
def test_channels_last(kind, net, batch):
    net.to(memory_format=torch.channels_last)
    check(kind, net, ce, (batch[0].to(memory_format=torch.channels_last), batch[1]))


@every
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("when", ["before", "warm", "after", "in place"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # its own
def test_compiled_modules(kind, backend, when, net, batch):
    rows = gradients(net, ce, batch, 6)
    torch.compiler.reset()
    parameters = trained(net)

    def compiled() -> nn.Module:
        if when == "in place":
            net.compile(backend=backend)
            return net
        return torch.compile(net, backend=backend)

    if when in ("before", "warm"):
        module = compiled()
    if when == "warm":
        ce(module, *batch).backward()
        net.zero_grad()
    engine = kind(net, parameters)
    if when in ("after", "in place"):
        module = compiled()
    for _ in range(2):
        engine.start()
        loss = ce(module, *batch)
        engine.arm()
        loss.backward()
        assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)
        net.zero_grad()
        engine.stop()
        ce(module, *batch).backward()
        assert all(p.grad.any() for p in parameters)
        net.zero_grad()
    engine.close()
    torch.compiler.reset()


@every
def test_checkpointed_activations(kind, net, batch):
    expected = clipped(kind, net, ce, batch)
    block = net.block
    net.block = lambda words: checkpoint(block, words, use_reentrant=False)
    result = clipped(kind, net, ce, batch)
    assert_near(result, expected, 1e-6)


def test_reentrant_checkpoints_are_refused(net, batch):
    block = net.block
    net.block = lambda words: checkpoint(block, words, use_reentrant=True)
    for kind in (BookKeeping, Hooks):
        with pytest.raises(RowsMismatch, match="use_reentrant=False"):
            clipped(kind, net, ce, batch)


@every
def test_a_gradient_of_a_gradient_is_refused(kind, net, batch):
    def penalised(module, x, y):
        x = x.clone().requires_grad_()
        loss = ce(module, x, y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + g.square().sum()

    with pytest.raises((RuntimeError, RowsMismatch), match=r"create_graph|arm\(\)"):
        clipped(kind, net, penalised, batch)


@every
def test_a_changed_input_is_noticed(kind):
    net = nn.Linear(4, 4)
    engine = kind(net, trained(net))
    engine.start()
    x = torch.randn(3, 4)
    loss = net(x).square().mean()
    x.add_(1)
    engine.arm()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every
def test_saved_tensor_hooks(kind, net, batch):
    expected = clipped(kind, net, ce, batch)
    with torch.autograd.graph.save_on_cpu():
        assert_near(clipped(kind, net, ce, batch), expected, 1e-6)


@every
def test_an_average_of_weights_taken_while_attached(kind, net, batch):
    """As weight-averaging callbacks do: a deep copy at the start, updated after each step, evaluated at the end."""
    engine = kind(net, trained(net))
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        recorded(engine, ce, batch)
        result = engine.clipped_sum(6, 0.5, Flat())
        for p, g in zip(net.parameters(), result.gradients, strict=True):
            p.grad = g
        optimizer.step()
        net.zero_grad()
        average.update_parameters(net)
    engine.stop()
    plain = copy.deepcopy(net)
    plain.load_state_dict(average.module.state_dict())
    engine.close()
    assert torch.equal(average(batch[0]), plain(batch[0]))
    assert not torch.equal(average(batch[0]), net(batch[0]))


@pytest.mark.ddp
@every
def test_two_processes(kind, tmp_path):
    script = Path(__file__).with_name("engines_ddp_script.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), kind.__name__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
