"""Sentences of Python's own documentation, by package: real text that every Python brings along."""

import ast
import random
import re
from collections import Counter
from pathlib import Path
from sysconfig import get_path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ._checks import whole
from .once import MOST_WORKERS

PACKAGES = ("asyncio", "email", "importlib", "logging", "unittest", "xml")
PADDING, UNKNOWN = 0, 1
FEWEST_WORDS = 5


def sentences(package: str) -> list[str]:
    """Sentences of a standard package's docstrings, lower case, letters and spaces only, each once, sorted.

    Raises:
        FileNotFoundError: this Python came without the sources of its library.
    """
    folder = Path(get_path("stdlib")) / package
    files = sorted(folder.rglob("*.py"))
    if not files:
        raise FileNotFoundError(f"{folder}: this Python came without the sources of its standard library")
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                    words = re.findall(r"[a-z]+", sentence.lower())
                    if len(words) >= FEWEST_WORDS:
                        found.add(" ".join(words))
    return sorted(found)


class PythonDocs(pl.LightningDataModule):
    """About 3,600 sentences from the docstrings of six packages of Python's standard library; which is it from?

    Batches are ``(ids, y)``: ``ids`` int64 of shape ``(B, length)``, a word each, 0 for padding and 1 for words that
    are not in the vocabulary; ``y`` int64 of shape ``(B,)``, the package. A sentence that occurs in several packages is
    left out. Split 65 / 15 / 20 % into train, val and test within each package. The vocabulary is the most frequent
    words of the training split.

    The text is that of the Python that runs: compare numbers between machines only where its version is the same.

    Args:
        batch_size: examples in a batch, for all three splits.
        length: words that are kept of a sentence; shorter ones are padded.
        vocabulary: number of ids, the two special ones included.
        seed: decides which sentence belongs to which split, and nothing else.
        num_workers: processes that load data; the whole set lies in memory, so none is usually fastest.

    Raises:
        ValueError: a setting is out of range.
        FileNotFoundError: when it is set up: this Python came without the sources of its standard library.
    """

    def __init__(
        self, batch_size: int = 64, length: int = 32, vocabulary: int = 2000, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        whole("batch_size", batch_size)
        whole("length", length, 1, 2**16)
        whole("vocabulary", vocabulary, 3, 2**20)
        whole("seed", seed, 0, 2**32 - 1)
        whole("num_workers", num_workers, 0, MOST_WORKERS)
        self.batch_size = batch_size
        self.length = length
        self.vocabulary = vocabulary
        self.seed = seed
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        by_package = [sentences(package) for package in PACKAGES]
        seen = Counter(sentence for part in by_package for sentence in part)
        splits: list[list[tuple[str, int]]] = [[], [], []]
        for label, part in enumerate(by_package):
            own = [sentence for sentence in part if seen[sentence] == 1]
            random.Random(f"{self.seed}/{label}").shuffle(own)  # noqa: S311  (not for secrets)
            first, second = round(0.65 * len(own)), round(0.8 * len(own))
            for split, rows in zip(splits, (own[:first], own[first:second], own[second:]), strict=True):
                split += [(row, label) for row in rows]
        for i, split in enumerate(splits[1:]):  # so that the first batches hold every package
            random.Random(f"{self.seed}/{i}").shuffle(split)  # noqa: S311
        counts = Counter(word for row, _ in splits[0] for word in row.split())
        words = sorted(counts, key=lambda word: (-counts[word], word))[: self.vocabulary - 2]
        ids = {word: i for i, word in enumerate(words, start=2)}
        self.train, self.val, self.test = (
            TensorDataset(self._encoded(split, ids), torch.tensor([label for _, label in split])) for split in splits
        )

    def _encoded(self, split: list[tuple[str, int]], ids: dict[str, int]) -> Tensor:
        out = torch.full((len(split), self.length), PADDING)
        for i, (row, _) in enumerate(split):
            found = [ids.get(word, UNKNOWN) for word in row.split()[: self.length]]
            out[i, : len(found)] = torch.tensor(found)
        return out

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
