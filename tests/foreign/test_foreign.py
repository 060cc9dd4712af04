"""Modules that other people wrote, trained and evaluated as they are."""

from __future__ import annotations

import pytest
import torch
from foreign.cases import CASES, NAMES
from foreign.runs import fit, make_trainer, portrait

from robust_train import PGD, TRADES, AdversarialTraining, RobustEvaluation

pytestmark = [  # the last two are torch.compile's own
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
CLASSIFIERS = [n for n in NAMES if CASES[n.values[0]].kind == "acc"]

STEPS = {"validate": "validation_step", "test": "test_step"}


@pytest.mark.parametrize("name", NAMES)
def test_trains_on_adversarial_examples(name):
    case = CASES[name]
    settings = {"max_epochs": 1, "limit_val_batches": 0}
    plain = fit(case, **settings)
    hardened = fit(case, AdversarialTraining(PGD(steps=2), case.ball(0.2), **case.where), **settings)
    weights = hardened.module.state_dict()
    assert weights.keys() == plain.module.state_dict().keys()
    assert vars(hardened.module).keys() == vars(plain.module).keys()
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    assert portrait(weights) != portrait(plain.module.state_dict())
    assert torch.isfinite(hardened.trainer.callback_metrics["train/adv_loss"])
    assert hardened.trainer.global_step == plain.trainer.global_step


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_trains_with_trades(name):
    case = CASES[name]
    callback = AdversarialTraining(PGD(steps=2), case.ball(0.2), TRADES(), **case.where)
    hardened = fit(case, callback, max_epochs=1, limit_val_batches=0)
    assert all(bool(torch.isfinite(w).all()) for w in hardened.module.state_dict().values())
    assert torch.isfinite(hardened.trainer.callback_metrics["train/adv_loss"])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_step_that_optimizes_by_hand_and_an_evaluation_without_loss_are_refused_outside_fit(stage):
    case = CASES["gan"]
    trainer = make_trainer(case.trainer, RobustEvaluation(PGD(steps=2), case.ball(0.2), **case.where))
    with pytest.raises(ValueError, match=f"return the loss from {STEPS[stage]}"):
        getattr(trainer, stage)(case.module(), dataloaders=case.data()["val_dataloaders"], verbose=False)


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] != "gan"])
def test_is_evaluated(name, stage):
    case = CASES[name]
    torch.manual_seed(0)
    module, data = case.module(), case.data()
    data = {"datamodule": data["datamodule"]} if "datamodule" in data else {"dataloaders": data["val_dataloaders"]}
    if "datamodule" in data:
        data["datamodule"].test_dataloader = data["datamodule"].val_dataloader
    before = portrait(module.state_dict())
    trainer = make_trainer(case.trainer, RobustEvaluation(PGD(steps=2), case.ball(0.2), **case.where))
    getattr(trainer, stage)(module, verbose=False, **data)
    prefix = {"validate": "val", "test": "test"}[stage]
    found = {k.removeprefix(f"{prefix}/"): float(v) for k, v in trainer.callback_metrics.items()}
    clean, robust = found[f"clean_{case.kind}"], found[f"robust_{case.kind}"]
    assert robust == found[f"robust_{case.kind}_pgd"]
    assert robust <= clean if case.kind == "acc" else robust >= clean
    if name != "lazy_validation":
        assert portrait(module.state_dict()) == before
