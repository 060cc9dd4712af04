"""Wrong labels, copies with other labels, and rows that do not belong."""

from __future__ import annotations

import pytest
import torch

from robust_train.poisoning.poisons.conflicting_duplicates import ConflictingDuplicates
from robust_train.poisoning.poisons.instance_flips import InstanceFlips, flip_by_input
from robust_train.poisoning.poisons.out_of_distribution import KINDS, OutOfDistribution, foreign_rows
from robust_train.poisoning.poisons.pair_flips import PairFlips
from robust_train.poisoning.poisons.random_flips import RandomFlips

N, CLASSES = 6000, 5
y = torch.arange(N) % CLASSES
x = torch.rand(N, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("poison", [RandomFlips(), PairFlips(), InstanceFlips(), RandomFlips(rate=1.0)], ids=str)
def test_every_flipped_label_is_wrong_and_inputs_stay(poison):
    poisoned = poison(x, y, CLASSES)
    assert torch.equal(poisoned.y != y, poisoned.mask)
    assert torch.equal(poisoned.x, x)
    assert int(poisoned.mask.sum()) == round(poison.rate * N)
    shares = y[poisoned.mask].bincount(minlength=CLASSES) / poisoned.mask.sum()
    assert (shares - 1 / CLASSES).abs().max() < 0.05  # no class is preferred


def test_random_flips_are_uniform_over_the_other_classes():
    flipped = RandomFlips(rate=1.0)(x, y, CLASSES).y
    steps = ((flipped - y) % CLASSES).bincount(minlength=CLASSES) / N
    torch.testing.assert_close(steps, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]), atol=0.03, rtol=0)


def test_pair_flips_go_to_the_next_class():
    poisoned = PairFlips()(x, y, CLASSES)
    assert torch.equal(poisoned.y, torch.where(poisoned.mask, (y + 1) % CLASSES, y))


def test_instance_flips_depend_on_the_input():
    """Copies of one row mostly go to one class, which random flips do not; another row's to another."""
    ones = torch.ones(400, dtype=torch.int64)
    inputs = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).repeat_interleave(50, dim=0)
    flipped = flip_by_input(inputs, ones, CLASSES, torch.Generator().manual_seed(0)).reshape(8, 50)
    favourites = flipped.mode(1).values
    assert (flipped == favourites[:, None]).float().mean() > 0.8
    assert len(favourites.unique()) > 1
    assert (flipped != 1).all()


def test_instance_flips_bear_constant_inputs_and_two_classes():
    flat = InstanceFlips(rate=1.0)(torch.zeros(50, 1, 8, 8), torch.arange(50) % 2, 2)
    assert torch.equal(flat.y, 1 - torch.arange(50) % 2)


def test_copies_are_exact_and_contradict_their_originals():
    poisoned = ConflictingDuplicates(rate=0.1)(x, y, CLASSES)
    assert poisoned.mask.tolist() == [False] * N + [True] * (N // 10)
    assert torch.equal(poisoned.x[:N], x)
    assert torch.equal(poisoned.y[:N], y)
    original = {tuple(row): label for row, label in zip(x.tolist(), y.tolist(), strict=True)}
    copies = poisoned.x[N:].tolist()
    assert all(original[tuple(c)] != new for c, new in zip(copies, poisoned.y[N:].tolist(), strict=True))
    assert len({tuple(c) for c in copies}) == N // 10  # each of another row


def test_foreign_rows_are_what_they_are_called():
    images, generator = torch.rand(20, 3, 8, 8), torch.Generator().manual_seed(0)
    made = {kind: foreign_rows(images, kind=kind, low=-1.0, high=1.0, generator=generator) for kind in KINDS}
    assert made["noise"].shape == images.shape
    assert made["noise"].min() < -0.9
    assert made["noise"].max() > 0.9
    assert (made["constant"].flatten(1).std(1) == 0).all()
    assert len(made["constant"][:, 0, 0, 0].unique()) == 20
    assert not torch.equal(made["permuted"], images)
    assert torch.equal(made["permuted"].flatten(1).sort(1).values, images.flatten(1).sort(1).values)


def test_foreign_rows_have_any_label():
    poisoned = OutOfDistribution(rate=0.5)(x, y, CLASSES)
    assert (poisoned.y[N:].bincount(minlength=CLASSES) / (N / 2) - 0.2).abs().max() < 0.05


def test_bad_settings_are_named():
    with pytest.raises(
        ValueError, match=r"out_of_distribution\.kind must be one of noise, constant, permuted, got 'x'"
    ):
        OutOfDistribution(kind="x")
    with pytest.raises(ValueError, match=r"out_of_distribution\.low must be a number below high"):
        OutOfDistribution(low=2.0)
