from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from filter_kit import CLASSES, WIDTH, Data, Idle, Marked, N, Net, flipped, loader, table
from foreign.batches import TupleBatch
from foreign.cases import CASES, NAMES
from foreign.data import image_columns
from foreign.data import loader as image_loader
from foreign.runs import RecordingLogger, Witness, assert_same, fit, make_trainer, portrait, seed_all
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from robust_train import DPSGD, PGD, AdversarialTraining, DataFilter, Policy, Probe, Threat
from robust_train.callbacks import _filtering
from robust_train.callbacks._filter_files import Mask
from robust_train.poisoning.filters.activation_clustering import ActivationClustering
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.filters.confident_learning import ConfidentLearning
from robust_train.poisoning.filters.duplicates import Duplicates
from robust_train.poisoning.filters.isolated_groups import IsolatedGroups
from robust_train.poisoning.filters.knn_labels import KNNLabels
from robust_train.poisoning.filters.mahalanobis import Mahalanobis
from robust_train.poisoning.filters.near_duplicates import NearDuplicates
from robust_train.poisoning.filters.que import QUE
from robust_train.poisoning.filters.small_loss import SmallLoss
from robust_train.poisoning.filters.spectral import Spectral
from robust_train.poisoning.filters.trusted_margin import TrustedMargin
from robust_train.poisoning.quarantine import Quarantine
from robust_train.poisoning.records import read_decisions

pytestmark = [  # the first two are torch.compile's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection:UserWarning"),
]
BAD = (3, 4, 5, 77, 150, 239)
GOOD = sorted(set(range(N)) - set(BAD))
BRIEF = Probe(epochs=2)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def probes(monkeypatch):
    """Each nested run adds an entry."""
    made = []
    real = _filtering.fit_copy
    monkeypatch.setattr(_filtering, "fit_copy", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    return made


def marking(rows=BAD, **settings) -> DataFilter:
    return DataFilter(filters={"marked": Marked(tuple(rows))}, **settings)


def idle(**settings) -> DataFilter:
    return DataFilter(**{"filters": {"idle": Idle()}, "probe": BRIEF, **settings})


def run(callback, data=None, *others, module=None, seed=0, **settings):
    """A short fit; ``data`` is a dataset, a loader, a structure of loaders, or a data module."""
    seed_all(seed)
    data = table() if data is None else data
    data = loader(data) if isinstance(data, Dataset) else data
    module = Net() if module is None else module
    callbacks = [c for c in (callback, *others) if c is not None]
    trainer = make_trainer(pl.Trainer, *callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    kind = "datamodule" if isinstance(data, pl.LightningDataModule) else "train_dataloaders"
    trainer.fit(module, **{kind: data})
    return module, trainer


def report() -> dict[str, Any]:
    return json.loads(Path("filter_report.json").read_text())


# --- nothing left out: nothing changed -----------------------------------------------------------------------------

NOT_JUDGED = {
    "gan": "found no logits",
    "segmentation": r"labels have shape \(8, 8, 8\)",
    "regression": "found no logits",
    "soft_labels": r"labels have shape \(8, 3\)",
}


def trace(found) -> dict[str, Any]:
    """All that must be the same, but for what the callback itself logs."""
    history = [(step, {k: v for k, v in m.items() if not k.startswith("filter/")}) for step, m in found.logger.history]
    history = [(step, m) for step, m in history if set(m) - {"epoch"}]
    metrics = {k: v for k, v in found.trace["metrics"].items() if not k.startswith("filter/")}
    return {**found.trace, "history": portrait(history), "metrics": metrics}


@pytest.mark.parametrize("name", NAMES)
def test_other_peoples_modules_train_as_without_it(name):
    case, callback = CASES[name], idle(**CASES[name].where)
    if name in NOT_JUDGED:
        with pytest.raises(ValueError, match=NOT_JUDGED[name]) as error:
            fit(case, callback)
        assert "DataFilter(predicate=…)" in str(error.value)
        return
    assert_same(trace(fit(case)), trace(fit(case, callback)))
    assert callback.kept.all()


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
        {"overfit_batches": 2},
    ],
    ids=str,
)
def test_it_changes_nothing_in_other_trainers(settings):
    assert_same(trace(fit(CASES["nasty"], **settings)), trace(fit(CASES["nasty"], idle(), **settings)))


class Cyclic(TupleBatch):
    """A schedule as long as the run; hooks with side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.maps, self.ended = [], [], 0
        self.net[0].register_forward_hook(lambda module, args, output: self.maps.append(output.mean().item()))

    def configure_callbacks(self):
        return [ModelCheckpoint("checkpoints", filename="of the module", enable_version_counter=False)]

    def on_train_epoch_start(self):
        self.print("an epoch begins")
        self.lines.append(f"{self.logger.name} {self.trainer.max_epochs}")
        self.logger.experiment.add_scalar("epoch", self.current_epoch)

    def on_train_end(self):
        self.ended += 1
        with open("at the end", "a") as file:
            file.write("once\n")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Noisy(Dataset):
    """Augments with generators of its own and with the global ones."""

    def __init__(self) -> None:
        (self.x, self.y), self.rng = image_columns(), np.random.default_rng(3)
        self.dice, self.generator = random.Random(3), torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i):
        noise = float(self.rng.normal()) + self.dice.random() + float(torch.rand((), generator=self.generator))
        return self.x[i] + 0.01 * noise * np.random.rand() * torch.rand(()), self.y[i]


@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
@pytest.mark.parametrize("kind", ["own generator", "workers", "noisy", "sampler", "batch_sampler"])
def test_it_changes_nothing_with_other_loaders(kind):
    def data():
        x, y = image_columns()
        settings = {
            "own generator": {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
            "workers": {"shuffle": True, "num_workers": 2, "persistent_workers": True},
            "sampler": {"sampler": RandomSampler(y, num_samples=30, replacement=True)},
        }.get(kind, {"shuffle": True})
        dataset = Noisy() if kind == "noisy" else TensorDataset(x, y)
        if kind == "batch_sampler":
            return {"train_dataloaders": DataLoader(dataset, batch_sampler=[[i, i + 1, i + 2] for i in range(18)])}
        return {"train_dataloaders": DataLoader(dataset, batch_size=8, **settings)}

    traces = []
    for callbacks in ([], [idle()]):
        torch.manual_seed(0)
        traces.append(trace(fit(CASES["tuple"], *callbacks, module=Cyclic(), data=data())))
    assert_same(*traces)
    assert Path("at the end").read_text() == "once\nonce\n"


class ServesItself(Net):
    """The module is its own source of data, made anew for each epoch."""

    def train_dataloader(self):
        return loader(table())

    def val_dataloader(self):
        return loader(table(32, seed=9), shuffle=False)


def test_it_changes_nothing_where_module_or_data_module_give_the_data():
    case = CASES["tuple"]
    for make in (lambda: {}, lambda: {"datamodule": Data(table())}):
        traces = []
        for callbacks in ([], [idle()]):
            torch.manual_seed(1)
            module = ServesItself() if not make() else Net()
            traces.append(trace(fit(case, *callbacks, module=module, data=make(), reload_dataloaders_every_n_epochs=1)))
        assert_same(*traces)


def test_a_compiled_module_is_judged_and_trains_as_without_it(monkeypatch):
    def backend(graph, inputs):
        return graph.forward

    traces = []
    for callbacks in ([], [idle()]):
        torch.manual_seed(0)
        module = torch.compile(TupleBatch(), backend=backend)
        traces.append(trace(fit(CASES["tuple"], *callbacks, module=module, max_epochs=1)))
    differing = {k for k in traces[0] if traces[0][k] != traces[1][k]}
    assert not differing - {"module", "by_batch"}
    assert traces[0]["module"].keys() == traces[1]["module"].keys()
