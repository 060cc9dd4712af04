"""Label smoothing, soft targets and mixup in the user's own loss: every objective works with them as it stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import CLASSES, image_columns, loader
from foreign.runs import assert_same, fit, portrait
from torch import nn

from robust_train import ALP, AWP, MART, PGD, PGDAT, TRADES, AdversarialTraining, GradAlign, RobustEvaluation
from robust_train.evasion.objectives.alp import logit_distance
from robust_train.evasion.objectives.mart import rows_of, runner_up_penalty, weighted_divergence
from robust_train.evasion.objectives.trades import prediction_divergence

OBJECTIVES = [PGDAT(), TRADES(), MART(), ALP(), AWP(), GradAlign()]


class Smoothed(TupleBatch):
    """Label smoothing in its own loss."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=0.2)


class Mixup(TupleBatch):
    """Mixes inputs and one-hot targets in its step, with another share and another order in every batch."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        share, order = torch.rand(()), torch.randperm(len(x))
        target = F.one_hot(y, CLASSES).float()
        target = share * target + (1 - share) * target[order]
        return F.cross_entropy(self(share * x + (1 - share) * x[order]), target)


class MixupLoader(TupleBatch):
    """Its batches hold soft targets already."""


def mixed():
    x, y = image_columns(n=24)
    target = F.one_hot(y, CLASSES).float()
    return loader(0.7 * x + 0.3 * x.flip(0), 0.7 * target + 0.3 * target.flip(0))


DATA = {Smoothed: lambda: loader(*image_columns(n=24)), Mixup: lambda: loader(*image_columns(n=24)), MixupLoader: mixed}


def run(module, *callbacks, **settings):
    torch.manual_seed(0)
    data = {"train_dataloaders": DATA[module](), "val_dataloaders": loader(*image_columns(n=12, seed=1))}
    return fit(CASES["tuple"], *callbacks, module=module(), data=data, **settings)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("module", DATA)
def test_every_objective_trains_with_them(module, objective):
    callbacks = [AdversarialTraining(PGD(steps=2), CASES["tuple"].ball(0.1), objective)]
    if module is not MixupLoader:  # its validation labels are another kind
        callbacks.append(RobustEvaluation(PGD(steps=2), CASES["tuple"].ball(0.1)))
    ours, plain = run(module, *callbacks), run(module)
    assert bool(ours.trainer.callback_metrics["train/adv_loss"].isfinite())
    assert portrait(dict(ours.module.state_dict())) != portrait(dict(plain.module.state_dict()))


@pytest.mark.parametrize("module", DATA)
def test_without_a_radius_nothing_changes(module):
    nothing = run(module, AdversarialTraining(PGD(steps=2), CASES["tuple"].ball(0)))
    assert_same(run(module).trace, nothing.trace)


@pytest.mark.parametrize("module", [Smoothed, MixupLoader])
@pytest.mark.parametrize(
    "objective", [PGDAT(), TRADES(beta=3), MART(beta=4), ALP(0.7, 0.2)], ids=lambda o: type(o).__name__
)
def test_the_own_part_of_the_loss_is_the_smoothed_one(module, objective):
    """One batch, no learning rate: the logged loss against the objective written out with the module's own loss."""
    seen = {}

    class Still(module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Spying(AdversarialTraining):
        def perturbed(self, *args):
            seen["x_adv"] = super().perturbed(*args)
            return seen["x_adv"]

    x, y = next(iter(DATA[module]()))
    data = {"train_dataloaders": torch.utils.data.DataLoader([(x.clone(), y)], batch_size=None)}
    callback = Spying(PGD(steps=2), CASES["tuple"].ball(0.1), objective)
    module = Still()
    result = fit(CASES["tuple"], callback, module=module, data=data, max_epochs=1)

    def own(z):
        smoothing = 0.2 if isinstance(module, Smoothed) else 0.0
        return F.cross_entropy(module.net(z), y, label_smoothing=smoothing)

    x_adv, clean = seen["x_adv"], module.net(x)
    adv = module.net(x_adv)
    if isinstance(objective, TRADES):
        hand = own(x) + 3 * prediction_divergence(clean, adv).mean()
    elif isinstance(objective, MART):  # a soft target counts as its most probable class there
        scores, truth, _ = rows_of(adv, y)
        each = runner_up_penalty(scores, truth) + 4 * weighted_divergence(rows_of(clean, y)[0], scores, truth)
        hand = own(x_adv) + each.mean()
    elif isinstance(objective, ALP):
        hand = 0.8 * own(x_adv) + 0.2 * own(x) + 0.7 * logit_distance(clean, adv).mean()
    else:
        hand = own(x_adv)
    torch.testing.assert_close(result.trainer.callback_metrics["train/adv_loss"], hand.detach())
