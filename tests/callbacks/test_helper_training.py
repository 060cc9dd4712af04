"""Helper-based adversarial training: the loss, the helper's weights, and where they come from."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, make_trainer, portrait, seed_all
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from robust_train import PGD, TRADES, AdversarialTraining, ClassifierVictim, HelperTraining, Threat
from robust_train.callbacks.helper_training import helper_labels
from robust_train.evasion.objectives.trades import prediction_divergence
from robust_train.evasion.randomness import generator_for

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "nasty", "manual_accumulation", "segmentation", "soft_labels", "skips_batches", "unified"]
SETTINGS = {"accumulate": {"accumulate_grad_batches": 3}, "bf16": {"precision": "bf16-mixed"}}


def training(case, **settings):
    return HelperTraining(PGD(steps=2), case.ball(0.1), **{"epochs": 1, **case.where, **settings})


@pytest.mark.parametrize("name", KINDS)
def test_without_helper_examples_it_is_trades(name):
    case = CASES[name]
    trades = AdversarialTraining(PGD(steps=2), case.ball(0.1), TRADES(2.5), **case.where)
    assert_same(fit(case, trades).trace, fit(case, training(case, gamma=0)).trace)


@pytest.mark.parametrize("name", KINDS)
def test_the_helper_leaves_no_trace_but_its_labels(name):
    case = CASES[name]
    first, second = fit(case, training(case)), fit(case, training(case))
    assert_same(first.trace, second.trace)
    trades = fit(case, training(case, gamma=0))
    assert first.trainer.global_step == trades.trainer.global_step
    assert portrait(dict(first.module.state_dict())) != portrait(dict(trades.module.state_dict()))
    assert "training_step" not in vars(first.module)


@pytest.mark.parametrize("settings", SETTINGS)
def test_other_trainers(settings):
    case = CASES["nasty"]
    ours = fit(case, training(case), **SETTINGS[settings])
    trades = fit(case, training(case, gamma=0), **SETTINGS[settings])
    assert ours.trainer.global_step == trades.trainer.global_step
    assert portrait(dict(ours.module.state_dict())) != portrait(dict(trades.module.state_dict()))


def linear(seed):
    torch.manual_seed(seed)
    module = TupleBatch()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    return module


def test_the_loss_is_the_one_written_out_by_hand(tmp_path):
    x, y = image_columns(n=8)
    module, helper, case = linear(0), linear(1), CASES["tuple"]
    torch.save({"state_dict": helper.state_dict()}, tmp_path / "helper.ckpt")
    callback = training(case, beta=2.0, gamma=0.7, reach=3.0, checkpoint=str(tmp_path / "helper.ckpt"), seed=3)
    data = {"train_dataloaders": loader(x, y)}
    measured = fit(case, callback, module=module, data=data, max_epochs=1).trainer.callback_metrics["train/adv_loss"]
    victim = TRADES().attacked(ClassifierVictim(module.net, y), x)
    x_adv = PGD(steps=2)(victim, x, case.ball(0.1), generator_for(x.device, 3, 0, 0, 0))
    net = module.net
    labels = helper.net(x_adv).argmax(1)
    assert bool((labels != y).any())
    hand = F.cross_entropy(net(x), y) + 2.0 * prediction_divergence(net(x), net(x_adv)).mean()
    hand = hand + 0.7 * F.cross_entropy(net(x + 3.0 * (x_adv - x)), labels)
    torch.testing.assert_close(measured, hand.detach())


def test_the_helper_is_judged_in_eval_mode_with_its_own_statistics(tmp_path):
    case = CASES["tuple"]
    helper = TupleBatch()
    helper.net(torch.rand(16, 1, 8, 8) * 5)  # moves the running statistics of batch normalisation
    torch.save(helper.state_dict(), tmp_path / "helper.ckpt")
    module, seen = TupleBatch(), []
    callback = training(case, checkpoint=str(tmp_path / "helper.ckpt"))

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            from robust_train.callbacks._helper import as_helper

            with as_helper(pl_module, callback._helper):
                seen.append(portrait(dict(pl_module.state_dict())))

    fit(case, callback, Look(), module=module, max_epochs=1)
    assert all(portrait(dict(helper.state_dict())) == state for state in seen)


def test_helper_labels_of_every_kind():
    assert helper_labels(torch.tensor([[0.1, 0.9], [2.0, 1.0]])).tolist() == [1, 0]
    assert helper_labels(torch.tensor([[0.3], [-0.2]])).tolist() == [[1], [0]]
    assert helper_labels(torch.tensor([0.3, -0.2])).tolist() == [1, 0]
    assert helper_labels(torch.zeros(2, 3, 4, 4)).shape == (2, 4, 4)


def test_a_run_that_is_resumed_has_the_same_helper(tmp_path):
    def run(epochs, folder, ckpt_path=None):
        seed_all(0)
        module = TupleBatch()
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        settings = {"max_epochs": epochs, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = make_trainer(pl.Trainer, training(CASES["tuple"]), saver, **settings)
        trainer.fit(module, loader(*image_columns()), ckpt_path=ckpt_path)
        return portrait(dict(module.state_dict()))

    straight = run(3, "straight")
    run(1, "first")
    torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        assert_same(straight, run(3, "second", tmp_path / "first" / "last.ckpt"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": -1}, "helper_training.beta must be >= 0"),
        ({"gamma": "x"}, "helper_training.gamma"),
        ({"reach": 1}, "helper_training.reach must be > 1"),
        ({"epochs": 0}, "helper_training.epochs"),
        ({"checkpoint": ""}, "helper_training.checkpoint"),
        ({"attack": PGD(random_start=False)}, "random_start=true"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        HelperTraining(**{"attack": PGD(), "threat": Threat(), **settings})


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    torch.save(linear(0).state_dict(), tmp_path / "other.ckpt")
    for path, why in (("other.ckpt", "it has no net"), ("missing.ckpt", "No such file")):
        with pytest.raises(ValueError, match=f"helper_training.checkpoint=.*does not fit TupleBatch: .*{why}"):
            fit(CASES["tuple"], training(CASES["tuple"], checkpoint=str(tmp_path / path)))
