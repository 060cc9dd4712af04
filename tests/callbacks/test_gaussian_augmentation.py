"""Training under noise in an unmodified Lightning run."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from foreign.batches import DictBatch, TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import make_trainer

from robust_train import PGD, AdversarialTraining, GaussianAugmentation, Threat


class Watching(TupleBatch):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        return super().training_step(batch, batch_idx)


def seen_with(*callbacks, epochs=1, seed=0):
    module, columns = Watching(), image_columns(200)
    before = [c.clone() for c in columns]
    torch.manual_seed(seed)
    make_trainer(pl.Trainer, *callbacks, max_epochs=epochs).fit(module, loader(*columns))
    assert all(torch.equal(a, b) for a, b in zip(before, columns, strict=True))
    assert "training_step" not in module.__dict__
    return torch.cat(module.seen)


def test_every_step_sees_noise_of_that_size_and_no_two_the_same():
    plain, noisy = seen_with(), seen_with(GaussianAugmentation(0.25))
    noise = noisy - plain
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    twice = seen_with(GaussianAugmentation(0.25), epochs=2)
    assert not torch.equal(twice[:200] - plain, twice[200:] - plain)
    scaled = seen_with(GaussianAugmentation(0.25, Threat(mean=0.0, std=0.5, low=-9, high=9))) - plain
    assert float(scaled.std()) == pytest.approx(0.5, rel=0.02)


def test_the_seed_decides():
    a, b, c = (seen_with(GaussianAugmentation(seed=s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_batches_of_dicts():
    make_trainer(pl.Trainer, GaussianAugmentation()).fit(DictBatch(), **CASES["dict"].data())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GaussianAugmentation(0), "gaussian_augmentation.sigma must be > 0 and finite, got 0"),
        (lambda: GaussianAugmentation(seed=-1), "gaussian_augmentation.seed"),
        (
            lambda: seen_with(GaussianAugmentation(), AdversarialTraining(PGD(), Threat())),
            "GaussianAugmentation and AdversarialTraining in one Trainer",
        ),
        (lambda: seen_with(GaussianAugmentation(threat=Threat(low=0.9))), "threat.mean"),
    ],
)
def test_mistakes_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_threat_must_be_one():
    with pytest.raises(TypeError, match="threat must be a robust_train Threat"):
        GaussianAugmentation(threat=0.1)  # type: ignore[arg-type]
