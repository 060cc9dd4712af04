"""Fashion-MNIST, read from the four idx files it is published as."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ._checks import whole
from .once import MOST_WORKERS, apply_once, check_features

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(path: str | Path, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or gzipped (by its name: ``.gz``).

    The format is two zero bytes, a byte for the element type (8 is uint8), a byte for the number of dimensions, each
    dimension as a big-endian uint32, and the elements. The file may come from anywhere, so no more is read than its
    header and one byte past what the header announces.

    Args:
        path: the file.
        ndim: how many dimensions it must have; 3 for images, 1 for labels.

    Returns:
        uint8 array with ``ndim`` dimensions.

    Raises:
        ValueError: the file is not such an idx file, or is damaged, cut short or too long.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            magic, header = file.read(4), file.read(4 * ndim)
            if magic != bytes((0, 0, 8, ndim)) or len(header) != 4 * ndim:
                raise ValueError(f"{path} is not an idx file of {ndim}-dimensional uint8 data (it begins {magic!r})")
            shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4"))
            size = math.prod(shape)
            if size > 2**30:
                raise ValueError(f"{path} announces {size} bytes of data, far more than Fashion-MNIST has")
            content = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    if len(content) != size:
        found = "more" if len(content) > size else f"only {len(content)}"
        raise ValueError(f"{path} should hold {size} bytes after its header and holds {found}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def read_split(folder: str | Path, prefix: str) -> TensorDataset:
    """Images and labels of one split.

    Args:
        folder: where the idx files lie, each plain or with ``.gz``.
        prefix: ``"train"`` or ``"t10k"``.

    Returns:
        Dataset of ``(x, y)``: ``x`` float32 ``(1, 28, 28)`` in [0, 1], ``y`` int64 scalar.

    Raises:
        ValueError: a file is damaged, or the two do not belong together.
    """
    images = read_idx(_existing(folder, f"{prefix}-images-idx3-ubyte"), ndim=3)
    labels = read_idx(_existing(folder, f"{prefix}-labels-idx1-ubyte"), ndim=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{prefix} images in {folder} are {images.shape[1:]} pixels, not (28, 28)")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{folder} holds {len(images)} {prefix} images and {len(labels)} {prefix} labels")
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{prefix} labels in {folder} reach {labels.max()}, there are {len(CLASSES)} classes")
    x = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    return TensorDataset(x, torch.from_numpy(labels.astype(np.int64)))


class FashionMNIST(pl.LightningDataModule):
    """60,000 training and 10,000 test images of clothing, ten classes, with a validation set held out of the former.

    Batches are ``(x, y)``: ``x`` float32 of shape ``(B, 1, 28, 28)`` in [0, 1], ``y`` int64 of shape ``(B,)``.

    Args:
        root: folder with the four idx files, plain or gzipped; also a folder in which torchvision keeps its copy
            (``root/FashionMNIST/raw``). The default is where Debian's package ``dataset-fashion-mnist`` puts them. If
            ``root`` has none and torchvision is installed, torchvision downloads them into torch's cache folder.
        batch_size: examples in a batch, for all three splits.
        val_size: how many training images are held out for validation; with 0 there is no validation.
        seed: decides which these are, and nothing else; independent of the global seed.
        num_workers: processes that load data.
        features: a module without anything to train, such as ``WaveletFeatures``, which is applied to the training
            images once: training batches then hold what it returns. The other splits remain images, so that whatever is
            measured on them is measured in pixels.

    Raises:
        FileNotFoundError: the files are nowhere to be found; says how to get them.
        ValueError: a file is damaged, or a setting is out of range.
        TypeError: ``root`` is no path, or ``features`` no module.

    Reference:
        Xiao et al., "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
    """

    def __init__(
        self,
        root: str = "/usr/share/datasets/fashion-mnist",
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
        num_workers: int = 0,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(root, (str, Path)):
            raise TypeError(f"root must be the path of a folder, got {root!r}")
        whole("batch_size", batch_size)
        whole("val_size", val_size, 0)
        whole("seed", seed, 0, 2**32 - 1)
        whole("num_workers", num_workers, 0, MOST_WORKERS)
        check_features(features)
        self.root = root
        self.batch_size = batch_size
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self.features = features

    def prepare_data(self) -> None:
        if self._folder() is not None:
            return
        try:
            from torchvision.datasets import FashionMNIST as Download  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"no Fashion-MNIST in {self.root}: install Debian's package (apt install dataset-fashion-mnist), or "
                f"set data.root=FOLDER to one with {FILES[0]}.gz and its three siblings, or install torchvision"
            ) from error
        Download(str(_cache()), download=True)

    def setup(self, stage: str | None = None) -> None:
        folder = self._folder()
        if folder is None:
            raise FileNotFoundError(f"no Fashion-MNIST in {self.root}; prepare_data() tells how to get it")
        if stage != "test":
            x, y = read_split(folder, "train").tensors
            if self.val_size >= len(y):
                raise ValueError(f"val_size={self.val_size} leaves none of the {len(y)} images to train on")
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
            val, train = order[: self.val_size], order[self.val_size :]
            inputs = x[train] if self.features is None else apply_once(self.features, x[train])
            self.train, self.val = TensorDataset(inputs, y[train]), TensorDataset(x[val], y[val])
        if stage in ("test", "predict", None):
            self.test = read_split(folder, "t10k")

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader(self.val) if self.val_size else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)

    def _loader(self, dataset: TensorDataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _folder(self) -> Path | None:
        """The first folder that has all four files."""
        root = Path(self.root).expanduser()
        for folder in (root, root / "FashionMNIST" / "raw", _cache() / "FashionMNIST" / "raw"):
            if all(_existing(folder, name).exists() for name in FILES):
                return folder
        return None


def _existing(folder: str | Path, name: str) -> Path:
    """The plain file where there is one, else the gzipped one."""
    plain = Path(folder) / name
    return plain if plain.exists() else plain.with_name(f"{name}.gz")


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "robust_train"
