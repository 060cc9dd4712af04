"""The text data, of Python's own docstrings, and the network for it."""

import pytest
import torch

from robust_train.starter import PythonDocs, TextCNN, python_docs


@pytest.fixture(scope="module")
def docs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "PACKAGES", ("logging", "importlib"))
        data = PythonDocs(batch_size=16, length=12, vocabulary=300)
        data.setup()
        yield data


def rows(dataset):
    return {(*ids.tolist(), int(y)) for ids, y in zip(*dataset.tensors, strict=True)}


def test_sentences_are_real_and_need_no_download():
    found = python_docs.sentences("logging")
    assert found == sorted(set(found))
    assert all(len(sentence.split()) >= 5 for sentence in found)
    assert any("log" in sentence.split() for sentence in found)
    with pytest.raises(FileNotFoundError, match="came without the sources of its standard library"):
        python_docs.sentences("no_such_package")


def test_batches_are_padded_ids_and_the_package(docs):
    ids, y = next(iter(docs.train_dataloader()))
    assert ids.shape == (16, 12)
    assert ids.dtype == y.dtype == torch.int64
    every = torch.cat([split.tensors[0] for split in (docs.train, docs.val, docs.test)])
    assert int(every.min()) >= 0
    assert int(every.max()) == 299
    words = every != 0
    assert bool((words.sum(1) >= 5).all())
    assert bool((words.long().diff(dim=1) <= 0).all())  # padding comes last
    assert all(split.tensors[1][:16].unique().tolist() == [0, 1] for split in (docs.val, docs.test))
    frequent = torch.bincount(docs.train.tensors[0].flatten(), minlength=300)[2:]
    assert int(frequent[0]) == int(frequent.max())


def test_splits_hold_other_sentences_and_both_packages_and_follow_from_the_seed(docs, monkeypatch):
    sizes = [len(split) for split in (docs.train, docs.val, docs.test)]
    total = sum(sizes)
    assert [round(size / total, 2) for size in sizes] == pytest.approx([0.65, 0.15, 0.2], abs=0.01)
    assert all(split.tensors[1].unique().tolist() == [0, 1] for split in (docs.train, docs.val, docs.test))
    monkeypatch.setattr(
        python_docs, "sentences", lambda package: [f"{package} has words {'abc'[i % 3] * i}" for i in range(1, 60)]
    )

    def split(seed):
        data = PythonDocs(seed=seed, vocabulary=1000, length=6)
        data.setup()
        return [part.tensors[0].tolist() for part in (data.train, data.val, data.test)]

    assert split(0) == split(0) != split(1)
    data = PythonDocs(length=6)
    data.setup()
    assert not rows(data.val) & rows(data.train)
    shared = ["all packages say so"]
    own = [f"is its own {'b' * i}" for i in range(5)]
    monkeypatch.setattr(python_docs, "sentences", lambda package: [*shared, *(f"{package} {row}" for row in own)])
    data.setup()  # what several packages say is left out
    assert sum(map(len, (data.train, data.val, data.test))) == 5 * 2


def test_the_network_learns_with_all_its_weights_and_padding_has_no_influence():
    torch.manual_seed(0)
    net = TextCNN(vocabulary=20, classes=3, width=8, channels=10).eval()
    ids = torch.randint(1, 20, (4, 6))
    longer = torch.nn.functional.pad(ids, (0, 5))
    torch.testing.assert_close(net(ids), net(longer))
    assert net(ids).shape == (4, 3)
    net(longer).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert not net.embedding.weight.grad[0].any()


def test_words_have_length_one_and_padding_none():
    net = TextCNN(vocabulary=20)
    assert net.embedding(torch.arange(20)).norm(dim=1).tolist() == pytest.approx([0.0] + [1.0] * 19)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PythonDocs(length=0), "length must be a whole number >= 1"),
        (lambda: PythonDocs(vocabulary=2), "vocabulary must be a whole number >= 3"),
        (lambda: TextCNN(vocabulary=1), "vocabulary must be a whole number >= 2"),
        (lambda: TextCNN(dropout=1.0), r"dropout must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
