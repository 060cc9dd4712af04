"""Free adversarial training: batches are replayed, and the perturbation is carried on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, make_trainer, portrait
from torch import nn

from robust_train import DPSGD, FreeTraining, Threat
from robust_train.callbacks.free_training import Replayed, carried

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "nasty", "manual_accumulation", "manual_closure", "manual_skips", "second_order", "unified"]
KINDS += ["skips_batches", "mutates_batch", "transfer_hook", "regression", "frozen_backbone", "gan"]
SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "clip": {"gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("name", KINDS)
def test_without_a_radius_and_replays_nothing_changes(name):
    case = CASES[name]
    assert_same(fit(case).trace, fit(case, FreeTraining(case.ball(0), replays=1, **inputs(case))).trace)


@pytest.mark.parametrize("settings", SETTINGS)
def test_nothing_changes_in_other_trainers_either(settings):
    case = CASES["nasty"]
    free = fit(case, FreeTraining(case.ball(0), replays=1), **SETTINGS[settings])
    assert_same(fit(case, **SETTINGS[settings]).trace, free.trace)
    moved = fit(case, FreeTraining(case.ball(0.1), replays=2), **SETTINGS[settings])
    assert portrait(dict(moved.module.state_dict())) != portrait(dict(free.module.state_dict()))


def inputs(case):
    return {"inputs": case.where["inputs"]} if "inputs" in case.where else {}


@pytest.mark.parametrize("name", KINDS)
def test_every_batch_is_trained_on_several_times(name):
    case = CASES[name]
    once, often = fit(case), fit(case, FreeTraining(case.ball(0.1), replays=3, **inputs(case)))
    if name not in ("skips_batches", "manual_accumulation", "manual_skips"):  # they count batches themselves
        assert often.trainer.global_step == 3 * once.trainer.global_step
    assert all(bool(p.isfinite().all()) for p in often.module.parameters())
    assert "training_step" not in vars(often.module)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_batches_are_the_algorithm_written_out_by_hand(norm):
    x, y = image_columns(n=12)  # a batch of 8 and one of 4
    module = TupleBatch()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
    hand = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    hand.load_state_dict(module.net.state_dict())
    eps = 0.1 if norm == "linf" else 0.8
    threat = Threat(norm, eps, low=-9, high=9)
    data = {"train_dataloaders": loader(x, y)}
    fit(CASES["tuple"], FreeTraining(threat, replays=2), module=module, data=data, max_epochs=1)

    delta = torch.zeros(8, 1, 8, 8)
    for part, labels in ((x[:8], y[:8]), (x[8:], y[8:])):
        for _ in range(2):
            here = delta[: len(part)].clone().requires_grad_(True)
            loss = F.cross_entropy(hand(part + here), labels)
            *grads, grad = torch.autograd.grad(loss, [*hand.parameters(), here])
            with torch.no_grad():
                for p, g in zip(hand.parameters(), grads, strict=True):
                    p -= 0.5 * g
                if norm == "linf":
                    delta = (here + eps * grad.sign()).clamp(-eps, eps)
                else:
                    size = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                    delta = here + eps * grad / size
                    delta *= (eps / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
    for a, b in zip(module.net.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_step_is_called_once_a_replay_with_inputs_inside_the_ball():
    seen = []

    class Spy(TupleBatch):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].detach().clone())
            return super().training_step(batch, batch_idx)

    x, y = image_columns(n=8)
    data = {"train_dataloaders": loader(x, y)}
    fit(CASES["tuple"], FreeTraining(Threat(eps=0.1), replays=4), module=Spy(), data=data, max_epochs=1)
    assert len(seen) == 4
    assert torch.equal(seen[0], x)
    assert not torch.equal(seen[1], x)
    for x_adv in seen:
        assert float(Threat(eps=0.1).size(x_adv, x).max()) <= 0.1 * (1 + 1e-6)
        assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1


def test_a_perturbation_is_cut_or_filled_up():
    delta = torch.ones(3, 2)
    assert carried(delta, torch.zeros(2, 2)).tolist() == [[1, 1], [1, 1]]
    assert carried(delta, torch.zeros(4, 2)).tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert not carried(delta, torch.zeros(3, 5)).any()
    assert not carried(None, torch.zeros(3, 5)).any()


def test_replayed_batches_are_copies():
    batch = [torch.zeros(2)]
    copies = list(Replayed([batch], 3))
    copies[0][0] += 1
    assert len(copies) == len(Replayed([batch], 3)) == 3
    assert not copies[1][0].any()
    assert not batch[0].any()


def test_the_order_of_epochs_is_that_of_a_run_without_it():
    """The loader is asked for its batches once an epoch, in the same random order."""
    seen = {1: [], 2: []}
    for times, rows in seen.items():

        class Spy(TupleBatch):
            def on_train_batch_start(self, batch, batch_idx, rows=rows):
                rows.append(batch[0].clone())

        fit(CASES["tuple"], FreeTraining(Threat(eps=0), replays=times), module=Spy(), limit_val_batches=0)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2][::2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2][1::2], strict=True))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FreeTraining(Threat(), replays=0), "free_training.replays"),
        (lambda: FreeTraining(Threat(), step=0), "free_training.step must be > 0 and finite, got 0"),
        (lambda: FreeTraining(Threat(), inputs=1.5), "inputs"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_private_training_is_refused():
    private = DPSGD(noise_multiplier=1.0, sample_rate=0.5)
    with pytest.raises(ValueError, match="FreeTraining cannot stand beside DPSGD"):
        make_trainer(CASES["tuple"].trainer, FreeTraining(Threat()), private).fit(TupleBatch(), **CASES["tuple"].data())
