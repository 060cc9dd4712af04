import gzip
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn

from robust_train.starter import MLP, Classifier, Digits, FashionMNIST
from robust_train.starter.fashion_mnist import FILES, read_idx


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder with 30 training and 12 test images, gzipped."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory, monkeypatch):
    """No copy of the developer's own may stand in for the one under test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path_factory.mktemp("hub")))


def splits(data):
    data.prepare_data()
    data.setup()
    return data.train.tensors, data.val.tensors, data.test.tensors


def test_digits_are_batches_of_images_in_the_unit_interval():
    data = Digits(batch_size=32)
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (32, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.min() == 0
    assert x.max() == 1


def test_digits_split_is_stratified_disjoint_and_complete():
    parts = splits(Digits())
    assert [len(y) for _, y in parts] == [1077, 270, 450]
    for _, y in parts:
        shares = y.bincount(minlength=10) / len(y)
        assert shares.min() > 0.08
        assert shares.max() < 0.12
    pixels, _ = load_digits(return_X_y=True)
    together = torch.cat([x.flatten(1) for x, _ in parts]).mul(16).long()
    assert sorted(together.tolist()) == sorted(pixels.astype(int).tolist())


def test_digits_split_depends_on_its_own_seed_alone():
    torch.manual_seed(1)
    first = splits(Digits(seed=0))[2][0]
    torch.manual_seed(2)
    again = splits(Digits(seed=0))[2][0]
    other = splits(Digits(seed=1))[2][0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loading_data_leaves_the_global_generator_alone(fashion):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    splits(Digits())
    splits(FashionMNIST(root=str(fashion), val_size=6))
    assert torch.equal(before, torch.get_rng_state())


def test_fashion_mnist_reads_a_folder(fashion):
    data = FashionMNIST(root=str(fashion), batch_size=8, val_size=6)
    train, val, test = splits(data)
    assert [len(y) for _, y in (train, val, test)] == [24, 6, 12]
    assert sorted(torch.cat((train[1], val[1])).tolist()) == sorted(i % 10 for i in range(30))
    x, y = next(iter(data.test_dataloader()))
    assert x.shape == (8, 1, 28, 28)
    assert x.dtype == torch.float32
    assert 0 <= x.min() <= x.max() <= 1
    assert y.tolist() == list(range(8))


@pytest.mark.parametrize("kind", ["digits", "fashion"])
def test_a_fixed_module_is_applied_to_the_training_images_alone_and_once(fashion, kind):
    class Halves(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += len(x)
            return x.flatten(1) / 2

    def data(**settings):
        return Digits(**settings) if kind == "digits" else FashionMNIST(root=str(fashion), val_size=6, **settings)

    images, halves = splits(data()), Halves()
    module = data(features=halves)
    found = splits(module)
    assert torch.equal(found[0][0], images[0][0].flatten(1) / 2)
    assert torch.equal(found[0][1], images[0][1])
    for part in (1, 2):
        assert torch.equal(found[part][0], images[part][0])
    for _ in range(2):
        list(module.train_dataloader())
    assert halves.calls == len(images[0][0])


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning")  # as it should be
def test_fashion_mnist_can_be_trained_on_as_a_whole(fashion, tmp_path):
    data = FashionMNIST(root=str(fashion), val_size=0)
    assert sorted(splits(data)[0][1].tolist()) == sorted(i % 10 for i in range(30))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(Classifier(MLP(shape=(1, 28, 28), hidden=())), data)
    assert trainer.global_step == 1
    assert sum(trainer.num_val_batches) == 0


def test_fashion_mnist_reads_plain_files_in_torchvisions_layout(fashion, tmp_path):
    raw = tmp_path / "elsewhere" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).write_bytes(gzip.decompress((fashion / f"{name}.gz").read_bytes()))
    compressed = splits(FashionMNIST(root=str(fashion), val_size=6))
    plain = splits(FashionMNIST(root=str(tmp_path / "elsewhere"), val_size=6))
    assert all(
        torch.equal(a, b) for one, two in zip(compressed, plain, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(FileNotFoundError, match=r"apt install dataset-fashion-mnist.*data\.root=FOLDER"):
        FashionMNIST(root=str(tmp_path)).prepare_data()


def test_fashion_mnist_falls_back_on_torchvision(fashion, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))

    def download(root, download):
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name in FILES:
            (raw / f"{name}.gz").write_bytes((fashion / f"{name}.gz").read_bytes())

    torchvision, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    datasets.FashionMNIST = download
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    assert len(splits(FashionMNIST(root=str(tmp_path / "nothing"), val_size=6))[0][1]) == 24


GOOD = idx(np.zeros((3, 28, 28), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an idx file"),
        (b"hello, world", "not an idx file"),
        (GOOD[:9], "not an idx file"),
        (bytes((0, 0, 13, 3)) + GOOD[4:], "not an idx file"),
        (idx(np.zeros(5, dtype=np.uint8)), "not an idx file"),
        (GOOD[:-1], "holds only 2351"),
        (GOOD + b"x", "holds more"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "announces"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_read_idx_refuses_what_is_not_one(tmp_path, content, says, packed):
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=says):
        read_idx(path, ndim=3)


def test_read_idx_refuses_a_damaged_gzip_file(tmp_path):
    good = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)))
    path = tmp_path / "images.gz"
    for bad in (good[:-200], GOOD, good[:100] + b"\0" * 20 + good[120:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"images\.gz"):
            read_idx(path, ndim=3)


def replace(folder, name, array):
    (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))


def test_fashion_mnist_refuses_files_that_do_not_belong_together(fashion):
    data = FashionMNIST(root=str(fashion), val_size=6)
    replace(fashion, "train-labels-idx1-ubyte", np.zeros(29, dtype=np.uint8))
    with pytest.raises(ValueError, match="30 train images and 29 train labels"):
        data.setup()
    replace(fashion, "train-labels-idx1-ubyte", np.full(30, 10, dtype=np.uint8))
    with pytest.raises(ValueError, match="labels .* reach 10"):
        data.setup()
    replace(fashion, "train-images-idx3-ubyte", np.zeros((30, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"not \(28, 28\)"):
        data.setup()


def test_settings_out_of_range_are_refused(fashion):
    with pytest.raises(ValueError, match="batch_size"):
        Digits(batch_size=0)
    with pytest.raises(ValueError, match="val_size"):
        FashionMNIST(val_size=-1)
    with pytest.raises(ValueError, match="leaves none"):
        FashionMNIST(root=str(fashion), val_size=30).setup()
