"""Any data set can be poisoned, and its samples keep their structure."""

from __future__ import annotations

import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from robust_train.poisoning.dataset import PoisonedDataset
from robust_train.poisoning.poisons.badnets import BadNets
from robust_train.poisoning.poisons.conflicting_duplicates import ConflictingDuplicates
from robust_train.poisoning.poisons.instance_flips import InstanceFlips
from robust_train.poisoning.poisons.out_of_distribution import OutOfDistribution
from robust_train.poisoning.poisons.random_flips import RandomFlips

N, CLASSES = 40, 4
X = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % CLASSES
Pair = namedtuple("Pair", ["image", "label", "note"])
POISONS = [
    BadNets(rate=0.2),
    RandomFlips(),
    InstanceFlips(),
    ConflictingDuplicates(rate=0.2),
    OutOfDistribution(rate=0.2),
]
every = pytest.mark.parametrize("poison", POISONS, ids=lambda p: p.name)


class Samples(Dataset):
    """Samples of any structure; counts how often each is read."""

    def __init__(self, make):
        self.make, self.reads = make, [0] * N

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.reads[i] += 1
        return self.make(X[i].clone(), int(Y[i]), i)


def as_tuple(x, y, i):
    return x, y, i


def as_pair(x, y, i):
    return Pair(x, torch.tensor(y), f"row {i}")


def as_list(x, y, i):
    return [x, np.int32(y)]


def as_dict(x, y, i):
    return {"id": i, "image": x, "label": torch.tensor([y], dtype=torch.int32)}


@every
def test_it_holds_what_the_poison_makes_of_tensors(poison):
    expected = poison(X, Y, CLASSES)
    dataset = PoisonedDataset(TensorDataset(X, Y), poison, CLASSES)
    assert len(dataset) == len(expected.x)
    assert torch.equal(dataset.mask, expected.mask)
    assert torch.equal(dataset.labels, expected.y)
    assert torch.equal(torch.stack([x for x, _ in dataset]), expected.x)
    assert torch.equal(torch.stack([y for _, y in dataset]), expected.y)


@pytest.mark.parametrize("make", [as_tuple, as_pair, as_list, as_dict])
@every
def test_samples_keep_their_structure(poison, make):
    dataset = PoisonedDataset(Samples(make), poison, CLASSES)
    expected = poison(X, Y, CLASSES)
    for i in range(len(dataset)):
        sample, plain = dataset[i], make(X[0], 0, i)
        assert type(sample) is type(plain)
        values = sample.values() if isinstance(sample, dict) else sample
        assert [type(v) for v in values] == [type(v) for v in (plain.values() if isinstance(plain, dict) else plain)]
        x, y = (sample["image"], sample["label"]) if isinstance(sample, dict) else sample[:2]
        assert torch.equal(x, expected.x[i])
        assert int(y) == expected.y[i]
        if isinstance(sample, dict):
            assert list(sample) == ["id", "image", "label"]
            assert sample["label"].dtype == torch.int32
            assert sample["label"].shape == (1,)
            assert i >= N or sample["id"] == i
        if isinstance(sample, Pair) and i < N:
            assert sample.note == f"row {i}"


@pytest.mark.parametrize("labels", [Y, Y.tolist()], ids=["tensor", "list"])
def test_only_rows_that_are_taken_are_read_where_labels_are_known(labels):
    source = Samples(as_tuple)
    dataset = PoisonedDataset(source, BadNets(rate=0.2), CLASSES, labels=labels)
    taken = dataset.mask.clone()
    taken[0] = True  # looked at for its structure
    assert torch.equal(torch.tensor(source.reads) > 0, taken)


def test_label_noise_leaves_augmentation_alive():
    class Noisy(Samples):
        def __getitem__(self, i):
            return torch.rand(1, 8, 8), int(Y[i])

    flipped = PoisonedDataset(Noisy(as_tuple), RandomFlips(rate=1.0), CLASSES)
    frozen = PoisonedDataset(Noisy(as_tuple), BadNets(rate=0.5), CLASSES)
    assert not torch.equal(flipped[0][0], flipped[0][0])
    row = int(frozen.mask.nonzero()[0])
    assert torch.equal(frozen[row][0], frozen[row][0])


def test_what_is_done_to_a_sample_does_not_reach_the_next_reader():
    rows = [{"x": x.clone(), "y": int(y)} for x, y in zip(X, Y, strict=True)]
    dataset = PoisonedDataset(rows, BadNets(rate=0.2), CLASSES)  # pyright: ignore[reportArgumentType]
    row = int(dataset.mask.nonzero()[0])
    first = dataset[row]["x"].clone()
    dataset[row]["x"].zero_()
    assert torch.equal(dataset[row]["x"], first)
    assert all(torch.equal(r["x"], x) and r["y"] == y for r, x, y in zip(rows, X, Y.tolist(), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_it_works_in_loaders(workers):
    dataset = PoisonedDataset(Samples(as_dict), ConflictingDuplicates(rate=0.2), CLASSES)
    context = "spawn" if workers else None
    loader = DataLoader(dataset, batch_size=16, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert torch.equal(torch.cat([b["label"][:, 0] for b in batches]).long(), dataset.labels)
    assert len(Subset(dataset, range(45))) == 45


def test_it_can_be_pickled():
    dataset = PoisonedDataset(TensorDataset(X, Y), BadNets(), CLASSES)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert all(torch.equal(dataset[i][k], copy[i][k]) for i in range(N) for k in (0, 1))


def test_numbers_count_from_the_end_and_stop_there():
    dataset = PoisonedDataset(TensorDataset(X, Y), ConflictingDuplicates(rate=0.2), CLASSES)
    assert torch.equal(dataset[-1][0], dataset[len(dataset) - 1][0])
    assert torch.equal(dataset[torch.tensor(3)][0], X[3])  # pyright: ignore[reportArgumentType]
    for i in (48, -49):
        with pytest.raises(IndexError, match="row -?4. of a data set of 48 rows"):
            dataset[i]


def test_the_place_of_input_and_label_can_be_named():
    dataset = PoisonedDataset(Samples(lambda x, y, i: (y, x)), RandomFlips(), CLASSES, input_key=1, label_key=0)
    assert [y for y, _ in dataset] == dataset.labels.tolist()
    named = PoisonedDataset(Samples(as_pair), RandomFlips(), CLASSES, input_key="image", label_key=-2)
    assert torch.equal(named.labels, dataset.labels)
    keyed = PoisonedDataset(
        Samples(lambda x, y, i: {"a": x, 7: y}), BadNets(rate=0.2), CLASSES, input_key="a", label_key=7
    )
    assert keyed[0].keys() == {"a", 7}


def test_data_sets_that_cannot_be_poisoned_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    def refused(says, dataset, **settings):
        with pytest.raises(ValueError, match=says):
            PoisonedDataset(dataset, BadNets(rate=0.2), CLASSES, **settings)

    refused("an iterable data set has no row numbers", Stream())
    refused("labels must be one a row", TensorDataset(X, Y), labels=Y[:3])
    refused("at least one row; there are 0 rows", TensorDataset(X[:0], Y[:0]))
    refused("a sample must be a tuple, list or mapping, got Tensor", X)
    refused(r"label_key=None finds nothing in a sample; set it to one of: 0", TensorDataset(X))
    refused(r"input_key='z' finds nothing .*: 0, 1, 2, image, label, note", Samples(as_pair), input_key="z")
    refused(r"input_key=None finds nothing .*: pixels, y", Samples(lambda x, y, i: {"pixels": x, "y": y}))
    for label in ("cat", 1.5, np.array(1), F.one_hot(Y[1], 4)):
        refused("a label must be a whole number or a tensor of one element", Samples(lambda x, y, i, v=label: (x, v)))
        refused("a label must be", Samples(lambda x, y, i, v=label: (x, v)), labels=Y)
    refused("must be tensors of one shape", Samples(lambda x, y, i: (x.numpy(), y)))
    refused("must be tensors of one shape", Samples(lambda x, y, i: (x[:, : 3 + i % 5], y)))
    refused("must be floating point", Samples(lambda x, y, i: ((x * 255).byte(), y)))
