"""Where inputs, labels and logits are found, and what happens where they are not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from robust_train import FGSM, PGD, TRADES, AdversarialTraining, RobustEvaluation, Threat, TorchAttack, WorstCase
from robust_train.callbacks._batch import find_input, label_candidates, replaced, write_back

X, Y = torch.rand(12, 1, 8, 8), torch.arange(12) % 4


class Rows(Dataset):
    """One batch of rows, of whatever structure ``make`` gives them."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return self.make(i)


class Module(pl.LightningModule):
    """Trains and validates on ``unpack(batch) -> x, y``."""

    def __init__(self, unpack, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        self.unpack = unpack

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = self.unpack(batch)
        return F.cross_entropy(self(x), y)

    def training_step(self, batch):
        return self.loss(batch)

    def validation_step(self, batch):
        self.log("val/loss", self.loss(batch), batch_size=12)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(*callbacks, **settings):
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def validated(module, make, **settings):
    callback = RobustEvaluation(PGD(steps=2), Threat(eps=0.1), **settings)
    return trainer(callback).validate(module, DataLoader(Rows(make), 12), verbose=False)[0]


def clean_accuracy(module):
    return float((module(X).argmax(1) == Y).float().mean())


@pytest.mark.parametrize(
    ("make", "unpack"),
    [
        (lambda i: (X[i], Y[i]), lambda b: b),
        (lambda i: (Y[i], X[i]), lambda b: (b[1], b[0])),
        (lambda i: (X[i], Y[i], i), lambda b: b[:2]),
        (lambda i: (X[i], F.one_hot(Y[i], 4).float(), 100 + i), lambda b: (b[0], b[1])),
        (lambda i: (100 + i, X[i], Y[i]), lambda b: b[1:]),
        (
            lambda i: {"image": X[i], "mask": torch.zeros(8, 8).long(), "label": Y[i]},
            lambda b: (b["image"], b["label"]),
        ),
    ],
    ids=["x-y", "y-x", "x-y-index", "x-soft-index", "index-x-y", "mask-and-label"],
)
def test_the_labels_are_those_that_fit_the_logits(make, unpack):
    module = Module(unpack)
    assert validated(module, make)["val/clean_acc"] == pytest.approx(clean_accuracy(module))


def test_logits_beside_other_outputs():
    class Two(Module):
        def forward(self, x):
            return self.net(x), x.flatten(1)

        def loss(self, batch):
            return F.cross_entropy(self(batch[0])[0], batch[1])

    module = Two(None)
    expected = float((module(X)[0].argmax(1) == Y).float().mean())
    assert validated(module, lambda i: (X[i], Y[i]))["val/clean_acc"] == pytest.approx(expected)


@pytest.mark.parametrize("mark", [-100, 255])
def test_positions_without_a_label_do_not_count(mark):
    labels = torch.randint(0, 3, (12, 8, 8))
    labels[:, :4] = mark

    class Segmentation(Module):
        def __init__(self):
            super().__init__(lambda b: b)
            self.net = nn.Conv2d(1, 3, 1)

        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=mark)

    module = Segmentation()
    expected = float((module(X).argmax(1) == labels)[:, 4:].float().mean())
    found = validated(module, lambda i: (X[i], labels[i]))
    assert found["val/clean_acc"] == pytest.approx(expected)
    assert found["val/robust_acc"] <= found["val/clean_acc"]


def test_an_evaluation_step_that_skips_is_skipped():
    class Skips(Module):
        def validation_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().validation_step(batch)

    callback = RobustEvaluation(PGD(steps=1), Threat(eps=0.1))
    runner = trainer(callback)
    runner.validate(Skips(lambda b: b), DataLoader(Rows(lambda i: (X[i], Y[i])), 6), verbose=False)
    assert "val/robust_acc" in runner.callback_metrics


def test_labels_or_logits_that_do_not_fit_are_refused():
    module = Module(lambda b: (b["x"], b["y"]))

    def make(i):
        return {"x": X[i], "y": Y[i], "weight": torch.rand(())}

    with pytest.raises(ValueError, match="labels="):
        validated(module, make, labels="weight")
    with pytest.raises(ValueError, match="is no submodule of Module; its children are: net"):
        validated(module, make, logits="head")
    assert validated(module, make, logits="net", labels="y")["val/clean_acc"] == pytest.approx(clean_accuracy(module))


@pytest.mark.parametrize(
    ("batch", "asked", "path"),
    [
        ((X, Y), None, (0,)),
        ((Y, X), None, (1,)),
        ({"label": torch.rand(12, 4), "image": X}, None, ("image",)),
        ({"a": Y, "b": X}, None, ("b",)),
        ({"views": [X, X], "y": Y}, "views.1", ("views", 1)),
        ([X, {"deep": X}], "1.deep", (1, "deep")),
        ((X, Y), -2, (0,)),
        (X, None, ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_input_rule(batch, asked, path):
    assert find_input(batch, asked) == path


def test_a_place_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="inputs='pixels' names no tensor of the batch; there are: image, label"):
        find_input({"image": X, "label": Y}, "pixels")
    assert label_candidates({"image": X, "label": Y}, ("image",), "label") == (("label",),)


def test_what_a_step_writes_into_its_batch_reaches_the_users():
    batch = {"x": X, "y": Y, "old": 1}
    sent = replaced(batch, ("x",), X + 1)
    value = sent["x"]
    sent["logits"] = 5
    del sent["old"]
    write_back(batch, sent, ("x",), value)
    assert batch.keys() == {"x", "y", "logits"}
    assert batch["x"] is X

    batch = ({"x": X}, Y)
    sent = replaced(batch, (0, "x"), X + 1)
    sent[0]["logits"] = 5
    write_back(batch, sent, (0, "x"), sent[0]["x"])
    assert batch[0].keys() == {"x", "logits"}
    assert batch[0]["x"] is X


@pytest.mark.parametrize("clear", ["module", "optimizer", "raw"])
def test_gradients_that_accumulate_survive_the_extra_calls(clear):
    class Manual(Module):
        def __init__(self):
            super().__init__(lambda b: b)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            if batch_idx % 2:
                optimizer = self.optimizers()
                (optimizer.optimizer if clear == "raw" else optimizer).step()
                (self if clear == "module" else optimizer).zero_grad()

    def fit(*callbacks):
        module = Manual()
        data = DataLoader(Rows(lambda i: (X[i], Y[i])), 3)
        trainer(*callbacks).fit(module, data)
        return module.state_dict()

    plain, hardened = fit(), fit(AdversarialTraining(PGD(steps=2), Threat(eps=0.0)))
    assert all(torch.equal(plain[k], hardened[k]) for k in plain)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attack": PGD(targeted="next"), "objective": TRADES()}, "loss of its own"),
        ({"attack": FGSM(), "warmup": "steps", "warmup_epochs": 2}, "no steps that could grow"),
        ({"attack": WorstCase([PGD()]), "warmup": "both", "warmup_epochs": 2}, "no steps that could grow"),
        ({"attack": TorchAttack("APGD"), "threat": Threat("l1", 2.0)}, "no L1 version"),
        ({"attack": TorchAttack("PGD"), "threat": Threat(low=(0.0,), high=(1.0,))}, "one range for all features"),
    ],
)
def test_what_cannot_be_combined_is_refused_at_once(arguments, says):
    with pytest.raises(ValueError, match=says):
        AdversarialTraining(**{"threat": Threat(), **arguments})


def test_a_gradient_that_vanishes_is_reported():
    class Saturated(Module):
        def loss(self, batch):
            return super().loss((batch[0] * 0, batch[1]))

    with pytest.warns(UserWarning, match="no attack can find anything"):
        trainer(AdversarialTraining(PGD(steps=1), Threat(eps=0.1))).fit(
            Saturated(lambda b: b), DataLoader(Rows(lambda i: (X[i], Y[i])), 12)
        )


def test_true_half_precision_is_attacked_too():
    moved = []

    class Watching(Module):
        def loss(self, batch):
            if self.trainer.training:
                moved.append(batch[0].detach().float())
            return super().loss(batch)

    runner = trainer(AdversarialTraining(PGD(steps=1, random_start=False), Threat(eps=0.1)), precision="16-true")
    runner.fit(Watching(lambda b: b), DataLoader(Rows(lambda i: (X[i], Y[i])), 12))
    assert float((moved[-1] - X.half().float()).abs().max()) > 0.09


def test_open_files_and_iterators_with_methods_stay_usable(tmp_path):
    class Loader:
        """An iterator that has a method."""

        def __init__(self):
            self.at = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.at += 1
            return self.at

        def name(self):
            return "mine"

    class Holding(Module):
        def on_fit_start(self):
            self.source, self.file = Loader(), (tmp_path / "seen.txt").open("w")
            self.drawn = []

        def loss(self, batch):
            self.drawn.append((next(self.source), self.source.name()))
            self.file.write("x")
            return super().loss(batch)

        def on_fit_end(self):
            self.file.close()

    module = Holding(lambda b: b)
    data = DataLoader(Rows(lambda i: (X[i], Y[i])), 4)
    trainer(AdversarialTraining(PGD(steps=2), Threat(eps=0.1))).fit(module, data)
    assert module.drawn == [(1, "mine"), (2, "mine"), (3, "mine")]
    assert type(module.source) is Loader


def test_an_attack_may_draw_from_the_global_generators_between_the_extra_calls():
    drawn = []

    class Drawing(PGD):
        def perturb(self, victim, x, threat, generator):
            for _ in range(4):
                victim.loss(x)
                drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
            return super().perturb(victim, x, threat, generator)

    class Stochastic(Module):
        def loss(self, batch):
            torch.rand(3), random.random()
            np.random.rand()
            return super().loss(batch)

    for module in (Module, Stochastic):
        drawn.clear()
        trainer(AdversarialTraining(Drawing(steps=1), Threat(eps=0.1))).fit(
            module(lambda b: b), DataLoader(Rows(lambda i: (X[i], Y[i])), 12)
        )
        assert all(len(set(column)) == 4 for column in zip(*drawn, strict=True))


def test_a_step_that_draws_and_then_skips_draws_once():
    class Skipping(Module):
        def on_fit_start(self):
            self.source, self.drawn = iter(range(100)), []

        def training_step(self, batch, batch_idx):
            self.drawn.append(next(self.source))
            return None if batch_idx % 2 == 0 else self.loss(batch)

    module = Skipping(lambda b: b)
    data = DataLoader(Rows(lambda i: (X[i], Y[i])), 3)
    trainer(AdversarialTraining(PGD(steps=2), Threat(eps=0.1))).fit(module, data)
    assert module.drawn == [0, 1, 2, 3]
