"""Handwritten digits of 8 by 8 pixels, small enough to train on in seconds and shipped with scikit-learn."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ._checks import whole
from .once import MOST_WORKERS, apply_once, check_features


class Digits(pl.LightningDataModule):
    """The 1,797 digits of scikit-learn, split 60 / 15 / 25 % into train, val and test with equal class shares.

    Batches are ``(x, y)``: ``x`` float32 of shape ``(B, 1, 8, 8)`` in [0, 1], ``y`` int64 of shape ``(B,)``.

    Args:
        batch_size: examples in a batch, for all three splits.
        seed: decides which example belongs to which split, and nothing else; independent of the global seed, so that
            runs with different seeds are measured on the same test set.
        num_workers: processes that load data; the whole set lies in memory, so none is usually fastest.
        features: as in :class:`~robust_train.starter.fashion_mnist.FashionMNIST`.

    Raises:
        ValueError: a setting is out of range.
        TypeError: ``features`` is no module.

    Reference:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """

    def __init__(
        self, batch_size: int = 64, seed: int = 0, num_workers: int = 0, features: nn.Module | None = None
    ) -> None:
        super().__init__()
        whole("batch_size", batch_size)
        whole("seed", seed, 0, 2**32 - 1)
        whole("num_workers", num_workers, 0, MOST_WORKERS)
        check_features(features)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.features = features

    def setup(self, stage: str | None = None) -> None:
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        y = torch.tensor(labels, dtype=torch.int64)

        rest, test = train_test_split(range(len(y)), test_size=0.25, stratify=y, random_state=self.seed)
        train, val = train_test_split(rest, test_size=0.2, stratify=y[rest], random_state=self.seed)
        self.train, self.val, self.test = (TensorDataset(x[part], y[part]) for part in (train, val, test))
        if self.features is not None:
            self.train = TensorDataset(apply_once(self.features, x[train]), y[train])

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val)

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
