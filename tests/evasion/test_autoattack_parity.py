"""APGD, targeted APGD, FAB and Square against torchattacks' at equal counts: verdicts and time, on 500 examples.

Run with ``pytest -m slow -s`` to see the table.
"""

from __future__ import annotations

import time
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from digit_models import digits, model, small_cnn
from torch import nn

from robust_train import APGD, APGDT, FAB, FGSM, PGD, Attack, ClassifierVictim, Square, Threat
from robust_train.evasion.attacks import apgd as apgd_module
from robust_train.evasion.attacks import square as square_module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EPS = {"undefended": {"linf": 0.06, "l2": 0.3}, "adversarial": {"linf": 0.15, "l2": 0.6}}
ORDER = {"linf": float("inf"), "l2": 2.0}
ATTACKS: dict[str, tuple[Attack, str, dict]] = {
    "apgd_ce": (APGD(), "APGD", {"steps": 100}),
    "apgd_dlr": (APGD(loss="dlr"), "APGD", {"steps": 100, "loss": "dlr"}),
    "apgd_targeted": (APGDT(), "APGDT", {"steps": 100}),
    "fab": (FAB(), "FAB", {"steps": 100, "multi_targeted": True}),
    "square": (Square(), "Square", {"n_queries": 5000}),
}


@cache
def trained_adversarially(norm: str) -> nn.Module:
    """A small model that was shown single-step (Linf) or PGD-3 (L2) examples."""
    x, y, _, _ = digits()
    attack, threat = (FGSM(1.25, 1.0) if norm == "linf" else PGD(3)), Threat(norm, EPS["adversarial"][norm])
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = small_cnn()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(15):
            for rows in torch.randperm(len(x)).split(64):
                x_adv = attack(ClassifierVictim(net, y[rows]), x[rows], threat, generator)
                optimizer.zero_grad()
                F.cross_entropy(net(x_adv), y[rows]).backward()
                optimizer.step()
    return net.eval()


def right(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """500 digits that the model gets right: torchattacks draws starts for those only."""
    x_train, y_train, x_test, y_test = digits()
    x, y = torch.cat([x_test, x_train]), torch.cat([y_test, y_train])
    with torch.no_grad():
        kept = (net(x).argmax(1) == y).nonzero().flatten()[:500]
    return x[kept], y[kept]


def standing(net: nn.Module, found: torch.Tensor, x: torch.Tensor, y: torch.Tensor, norm: str, eps: float):
    with torch.no_grad():
        correct = net(found).argmax(1) == y
    return correct | ((found - x).flatten(1).norm(p=ORDER[norm], dim=1) > eps * 1.0001)


def same_start(norm: str):
    """torchattacks' starts, from the global generator: one direction an example instead of one a batch."""

    def start(origin: torch.Tensor, threat: Threat, generator: torch.Generator) -> torch.Tensor:
        noise = 2 * torch.rand(origin.shape) - 1 if norm == "linf" else torch.randn(origin.shape)
        length = noise.flatten(1).norm(p=ORDER[norm], dim=1).view(-1, 1, 1, 1)
        return (origin + threat.radius * noise / length).clamp(0, 1)

    return start


def their_window(side: int, height: int, width: int, u: float, v: float) -> tuple[slice, slice]:
    """torchattacks never puts a window at the lower and right edges."""
    top, left = int(u * (height - side)), int(v * (width - side))
    return slice(top, top + side), slice(left, left + side)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", EPS)
@pytest.mark.parametrize("name", ATTACKS)
def test_verdicts_are_those_of_torchattacks(name, kind, norm, monkeypatch, capsys):
    torchattacks = pytest.importorskip("torchattacks")
    net = model() if kind == "undefended" else trained_adversarially(norm)
    x, y = (rows[: 250 if name == "square" else 500] for rows in right(net))
    eps = EPS[kind][norm]
    attack, theirs, settings = ATTACKS[name]

    def ours(seed: int = 0) -> torch.Tensor:
        victim = ClassifierVictim(net, y, stop_when_fooled=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = attack(victim, x, Threat(norm, eps), torch.Generator().manual_seed(seed))
        return standing(net, found, x, y, norm, eps)

    def reference(seed: int = 0) -> torch.Tensor:
        with torch.random.fork_rng():
            kwargs = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed}
            found = getattr(torchattacks, theirs)(net, **kwargs, **settings)(x, y)
        return standing(net, found.detach(), x, y, norm, eps)

    start = time.process_time()
    own = ours()
    middle = time.process_time()
    want = reference()
    ratio = (middle - start) / (time.process_time() - middle)
    with capsys.disabled():
        print(
            f"\n{kind:11} {norm:4} {name:13} standing {int(own.sum())} vs {int(want.sum())} of {len(x)}, "
            f"differ {int((own != want).sum())} (ours alone fools {int((~own & want).sum())}), time ratio {ratio:.2f}"
        )
    assert int(own.sum()) <= int(want.sum()) + 5  # 1 %
    if name == "fab":  # not random
        assert int((own != want).sum()) <= 5
        return
    # what is left is luck: the same draws, or two seeds of theirs, differ as little or as much
    if name == "square":
        monkeypatch.setattr(square_module, "_window", their_window)
        luck = int((want != reference(1)).sum())
    else:
        monkeypatch.setattr(apgd_module, "_start", same_start(norm))
        luck = 0
    again = ours()
    with capsys.disabled():
        print(f"{'':31} drawn alike: {int(again.sum())}, differ {int((again != want).sum())}; their seeds: {luck}")
    assert int((again != want).sum()) <= 5 + 2 * luck
