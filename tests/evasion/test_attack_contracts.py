"""What every attack of ``conf/attack/*.yaml`` promises. A new yaml is picked up by itself."""

from __future__ import annotations

import copy
import random
from functools import cache
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from torch import nn

from robust_train import ClassifierVictim, Threat, UniformNoise, save_universal
from robust_train.config import build
from robust_train.hydra_plugin import config_dir, register

ATTACKS = sorted(path.stem for path in (config_dir("conf") / "attack").glob("*.yaml"))
NORMS = ("linf", "l2", "l1", "l0")
EPS = {"linf": 0.2, "l2": 1.0, "l1": 4.0, "l0": 6}
FEWER = {  # what takes thousands of passes by default
    "apgd_targeted": ("targets=2",),
    "auto_attack": ("version=custom", "steps=10", "targets=2", "queries=30"),
    "fab": ("steps=10", "targets=2"),
    "sparse_rs": ("queries=50",),
    "spatial_grid": ("grid=[3,3]",),
    "square": ("queries=50",),
}


def make(name: str):
    from hydra import compose, initialize

    register()
    with initialize(version_base="1.3", config_path=None):
        mounts = "hydra.searchpath=[robust-train://,robust-train://robust_train]"
        few = (f"path={universal()}",) if name == "universal" else FEWER.get(name, ())
        fewer = [f"attack.{setting}" for setting in few]
        attack = build(compose(overrides=[mounts, f"+attack={name}", *fewer]).attack)
    if attack.family == "external":
        pytest.importorskip("torchattacks")
    return attack


@cache
def universal() -> str:
    path = f"{mkdtemp()}/universal.safetensors"
    save_universal(path, torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(4)) - 0.5, Threat(eps=0.5))
    return path


def usual(name: str) -> Threat:
    """A threat that this attack works within."""
    return Threat("l0", EPS["l0"]) if name == "sparse_rs" else Threat(eps=0.2)


def run(attack, net, x, labels, threat, seed=0):
    """The attack's result, or a skip where it says that it does not know this norm."""
    try:
        return attack(ClassifierVictim(net, labels), x, threat, torch.Generator().manual_seed(seed))
    except ValueError as error:
        if "norm" in str(error) or "L1 version" in str(error):
            pytest.skip(str(error))
        raise


def snapshot(net: nn.Module):
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [p.grad for p in net.parameters()],
        [p.requires_grad for p in net.parameters()],
        [m.training for m in net.modules()],
        [id(b) for b in net.buffers()],
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    )


def assert_unchanged(before, net):
    after = snapshot(net)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1] == after[1] == [None] * len(before[1])
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5][0], after[5][0])
    assert before[5][1:] == after[5][1:]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ATTACKS)
def test_leaves_no_trace_and_is_reproducible(name, mode, norm, net, images, labels):
    attack, threat = make(name), Threat(norm, EPS[norm])
    net.train(mode == "train")
    x, y = images.clone(), labels.clone()
    before = snapshot(net)
    first = run(attack, net, x, y, threat)
    assert_unchanged(before, net)
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert not x.requires_grad
    assert not first.requires_grad
    assert first.shape == x.shape
    if mode == "eval":
        assert torch.equal(first, run(attack, net, x, y, threat))


@pytest.mark.parametrize("name", ATTACKS)
def test_leaves_no_trace_after_an_exception(name, net, images, labels):
    class Model(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.net, self.calls, self.last = net, 0, last

        def forward(self, x):
            self.calls += 1
            out = self.net(x)
            if self.calls == self.last:
                raise RuntimeError("the model broke")
            return out

    def attack(model):
        make(name)(ClassifierVictim(model, labels), images, usual(name), torch.Generator().manual_seed(0))

    attack(whole := Model(last=None).train())
    if whole.calls == 0:
        pytest.skip("it does not ask the model")
    model = Model(last=whole.calls).train()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the model broke"):
        attack(model)
    assert_unchanged(before, model)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_eps_zero_returns_x(name, norm, net, images, labels):
    assert torch.equal(run(make(name), net, images, labels, Threat(norm, 0.0)), images)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_batch_of_one(name, net, images, labels):
    assert run(make(name), net, images[:1], labels[:1], usual(name)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_stays_inside_ball_and_box(name, norm, dtype, net, images, labels):
    attack, threat = make(name), Threat(norm, EPS[norm])
    x = images.to(dtype)
    out = run(attack, net.to(dtype), x, labels, threat)
    assert out.dtype == dtype
    if attack.limits is None:
        assert bool((threat.size(out, x) <= attack.reach * threat.eps * (1 + 1e-6)).all())
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_stronger_than_noise(name, norm, dtype, net, images, labels):
    attack, threat = make(name), Threat(norm, EPS[norm])
    if attack.family not in ("gradient", "ensemble", "external"):
        pytest.skip("not promised by its family")
    if attack.family == "external" and dtype != torch.float32:
        pytest.skip("gradient attacks promise it for coarse dtypes")
    net, x = net.to(dtype), images.to(dtype)

    def loss(x_adv):
        with torch.no_grad():
            return float(ClassifierVictim(net, labels).loss(x_adv).mean())

    assert loss(run(attack, net, x, labels, threat)) > loss(run(UniformNoise(), net, x, labels, threat))


# the share of the optimum's gain that an attack must reach on a linear loss, whose optimum is known in closed form
RATIO = {"linf": 0.999, "l2": 0.9, "l1": 0.9}
ONE_STEP_RATIO = {"linf": 0.2, "l2": 0.2, "l1": 0.1}  # from a random start, or to a corner of ball and box at once
BOXES = {
    "wide": {"low": -100.0, "high": 100.0},
    "pixels": {"low": 0.0, "high": 1.0},
    "table": {
        "low": tuple(-i / 10 for i in range(36)),
        "high": tuple(1 + i / 20 for i in range(36)),
        "mutable": tuple(i % 3 > 0 for i in range(36)),
    },
}


def optimum(w, room, norm, eps):
    """The largest ``w * delta`` with ``|delta| <= room`` inside the ball, for each example."""
    w = w.abs().expand_as(room)
    if norm == "linf":
        return (w * room.clamp(max=eps)).sum(1)
    if norm == "l1":  # the largest weights first, each up to its room
        order = w.argsort(1, descending=True)
        w, room = w.gather(1, order), room.gather(1, order)
        spent = room.cumsum(1) - room
        return (w * torch.minimum(room, (eps - spent).clamp_min(0))).sum(1)
    low, high = torch.zeros(len(room), 1), torch.full((len(room), 1), 1e6)
    for _ in range(100):  # delta = min(c * w, room), c such that its norm is eps
        middle = (low + high) / 2
        too_long = torch.minimum(middle * w, room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(too_long, low, middle), torch.where(too_long, middle, high)
    return (w * torch.minimum(low * w, room)).sum(1)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_comes_close_to_the_closed_form_optimum_of_a_linear_model(name, norm, box):
    attack = make(name)
    if attack.family != "gradient" or attack.reach != 1:
        pytest.skip("not a gradient attack that stays in the ball")
    g = torch.Generator().manual_seed(3)
    w, eps = torch.randn(36, generator=g), EPS[norm]
    x, labels = torch.rand(5, 36, generator=g), torch.zeros(5, dtype=torch.long)
    model = nn.Linear(36, 2, bias=False)
    model.weight.data = torch.stack([-w / 2, w / 2])  # raising the loss of class 0 means raising w * x
    threat = Threat(norm, eps, **BOXES[box])
    low, high = threat.box(x)
    gain = (run(attack, model, x, labels, threat) - x) @ w
    ratio = gain / optimum(w, torch.where(w > 0, high - x, x - low), norm, eps)
    assert float(ratio.max()) <= 1 + 1e-5
    assert float(ratio.min()) >= (RATIO if attack.passes > 1 else ONE_STEP_RATIO)[norm]


def test_no_parameter_gradient_is_computed(net, images, labels):
    touched = []
    for p in net.parameters():
        p.register_hook(lambda g: touched.append(1))
    for name in ATTACKS:
        run(make(name), net, images, labels, usual(name))
    assert not touched
    assert all(p.grad is None for p in net.parameters())


def test_the_callers_settings_are_frozen():
    for name in ATTACKS:
        attack = make(name)
        with pytest.raises(AttributeError):
            copy.copy(attack).steps = 3
