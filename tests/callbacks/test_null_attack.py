"""An attack of radius 0 must not change a run by one bit, whatever the module does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from foreign.cases import CASES, NAMES
from foreign.runs import assert_same, fit

from robust_train import PGD, TRADES, AdversarialTraining, RobustEvaluation, Threat

pytestmark = [  # the last two are torch.compile's own
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "clip": {"gradient_clip_val": 0.5},
}


@cache
def plain_trace(name: str, settings: str = "plain") -> dict[str, Any]:
    return fit(CASES[name], **SETTINGS[settings]).trace


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_a_module_that_does_everything_trains_as_if_alone(mode, settings):
    callback = AdversarialTraining(PGD(steps=3), Threat(eps=0), mode=mode)
    assert_same(plain_trace("nasty", settings), fit(CASES["nasty"], callback, **SETTINGS[settings]).trace)


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] != "nasty"])
def test_every_foreign_module_trains_as_if_alone(name):
    case = CASES[name]
    callback = AdversarialTraining(PGD(steps=3), case.ball(0), **case.where)
    assert_same(plain_trace(name), fit(case, callback).trace)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_leaves_training_alone(name):
    case = CASES[name]
    callback = RobustEvaluation(PGD(steps=3), case.ball(0.1), **case.where)
    assert_same(plain_trace(name), fit(case, callback).trace)


class Gradients:
    """Hands out the gradients of the first step."""

    def __init__(self, name: str, *callbacks: Any) -> None:
        case, found = CASES[name], []

        class Watched(case.module):  # type: ignore[misc,name-defined]
            def on_before_optimizer_step(self, optimizer):
                found.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

        torch.manual_seed(0)
        fit(case, *callbacks, module=Watched(), max_steps=1, limit_val_batches=0)
        self.values = found[0]


@pytest.mark.parametrize("name", ["tuple", "tabular_binary", "segmentation", "encoder_and_head", "returns_object"])
def test_the_gradient_of_trades_without_a_radius_is_the_plain_one(name):
    case = CASES[name]
    plain = Gradients(name).values
    with_trades = Gradients(name, AdversarialTraining(PGD(steps=2), case.ball(0), TRADES(), **case.where)).values
    for a, b in zip(plain, with_trades, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
