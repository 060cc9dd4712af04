"""Training on threats of several norms: the worst, one at random, or the mean of all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, portrait
from torch import nn

from robust_train import (
    AWP,
    MART,
    PGD,
    PGDAT,
    TRADES,
    AdversarialTraining,
    AverageTraining,
    ClassifierVictim,
    EachThreat,
    RobustEvaluation,
    Threat,
    ThreatUnion,
)
from robust_train.evasion.objectives.trades import prediction_divergence
from robust_train.evasion.randomness import generator_for

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "nasty", "manual_accumulation", "skips_batches", "unified"]
UNION = ThreatUnion(eps=0.1, also={"l2": 0.6})
NOTHING = ThreatUnion(eps=0, also={"l2": 0})


def training(how, threat=UNION, objective=None):
    if how == "average":
        return AverageTraining(PGD(steps=2), threat, objective)
    return AdversarialTraining(EachThreat(PGD(steps=2), how), threat, objective)


@pytest.mark.parametrize("how", ["worst", "random", "average"])
@pytest.mark.parametrize("name", KINDS)
def test_every_way_trains_unmodified_modules(name, how):
    case = CASES[name]
    plain = fit(case)
    judge = RobustEvaluation({"both": EachThreat(PGD(steps=2))}, UNION)
    ours = fit(case, training(how), judge)
    assert ours.trainer.global_step == plain.trainer.global_step
    assert portrait(dict(ours.module.state_dict())) != portrait(dict(plain.module.state_dict()))
    metrics = ours.trainer.callback_metrics
    assert metrics["val/robust_acc"] <= metrics["val/clean_acc"]
    nothing = fit(case, training(how, NOTHING)).trace
    if how == "average":  # the mean of two equal losses, whose gradients add up in another order
        assert nothing["global_step"] == plain.trace["global_step"]
    else:
        assert_same(plain.trace, nothing)


def one_batch(objective):
    x, y = image_columns(n=8)
    module = TupleBatch()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    callback = AverageTraining(PGD(steps=2), UNION, objective, seed=3)
    data = {"train_dataloaders": loader(x, y)}
    metrics = fit(CASES["tuple"], callback, module=module, data=data, max_epochs=1).trainer.callback_metrics
    victim, generator = ClassifierVictim(module.net, y), generator_for(x.device, 3, 0, 0, 0)
    victim = PGDAT().attacked(victim, x) if objective is None else objective.attacked(victim, x)
    found = [PGD(steps=2)(victim, x, threat, generator) for threat in UNION.members]
    return module.net, x, y, found, metrics["train/adv_loss"]


def test_the_average_is_the_mean_of_the_losses_within_each_ball():
    net, _, y, found, measured = one_batch(None)
    torch.testing.assert_close(measured, sum(F.cross_entropy(net(x_adv), y) for x_adv in found).detach() / 2)


def test_the_average_of_trades_has_the_clean_loss_once():
    net, x, y, found, measured = one_batch(TRADES(beta=3))
    divergences = [prediction_divergence(net(x), net(x_adv)).mean() for x_adv in found]
    torch.testing.assert_close(measured, (F.cross_entropy(net(x), y) + 3 * sum(divergences) / 2).detach())


def test_the_average_of_mart_runs():
    *_, measured = one_batch(MART())
    assert bool(measured.isfinite())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: AverageTraining(PGD(), Threat()), TypeError, "average_training.threat must be a ThreatUnion"),
        (lambda: AverageTraining(EachThreat(), UNION), ValueError, "give the attack inside EachThreat"),
        (lambda: AverageTraining(PGD(), UNION, AWP()), ValueError, "AWP works with those of one"),
    ],
)
def test_bad_settings_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_an_attack_for_one_ball_is_refused():
    with pytest.raises(ValueError, match="give EachThreat"):
        fit(CASES["tuple"], AdversarialTraining(PGD(steps=1), UNION))
