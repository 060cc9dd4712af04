"""Rows judged while the run itself trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from filter_kit import N, Net, flipped, loader, table
from foreign.runs import make_trainer, seed_all
from pytorch_lightning.callbacks import ModelCheckpoint

from robust_train import PGD, AdversarialTraining, DataFilter, Probe, Threat
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.filters.duplicates import Duplicates
from robust_train.poisoning.filters.small_loss import SmallLoss

NOISY, BAD = flipped(table(), 0.15)
MANY = Probe(canaries=0.1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def watching(*filters, **settings):
    return DataFilter(filters=list(filters) or None, when="during", probe=MANY, **{"warmup_epochs": 3, **settings})


def run(data_filter, data=NOISY, *others, epochs=6, module=None, **settings):
    seed_all(0)
    module = Net() if module is None else module
    trainer = make_trainer(
        pl.Trainer, data_filter, *others, **{"max_epochs": epochs, "limit_val_batches": 0, **settings}
    )
    trainer.fit(module, loader(data), ckpt_path=settings.pop("ckpt_path", None))
    return module, trainer


class Starts(pl.Callback):
    """The first weight at the start of every epoch."""

    def __init__(self):
        self.weights, self.momenta = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.weights.append(pl_module.net[0].weight.detach().clone())
        self.momenta.append(len(trainer.optimizers[0].state))


@pytest.mark.parametrize("method", [AUM(), SmallLoss(skip=0)], ids=["aum", "small_loss"])
def test_flipped_rows_are_found_and_not_trained_on_afterwards(method):
    data_filter = watching(method)
    module, _ = run(data_filter)
    bad = BAD.numpy()
    assert (~data_filter.kept & bad).sum() >= 0.6 * bad.sum()
    assert (~data_filter.kept & ~bad).sum() <= 0.06 * (~bad).sum()
    kept = np.flatnonzero(data_filter.kept).tolist()
    assert all(sorted(rows) == list(range(N)) for rows in module.seen[:3])
    assert all(sorted(rows) == kept for rows in module.seen[3:])


@pytest.mark.parametrize("restart", [True, False])
def test_training_starts_again_if_it_is_told_to(restart):
    starts = Starts()
    run(watching(restart=restart), NOISY, starts)
    assert torch.equal(starts.weights[3], starts.weights[0]) == restart
    assert (starts.momenta[3] == 0) == restart
    assert not torch.equal(starts.weights[4], starts.weights[3])


def test_the_files_say_what_was_done():
    data_filter = watching()
    _, trainer = run(data_filter)
    report = json.loads((Path(trainer.log_dir or ".") / "filter_report.json").read_text())
    assert report["kept"] == int(data_filter.kept.sum())
    assert report["filters"]["aum"]["calibration"]["method"] == "label canaries"
    assert report["probe"] == {"epochs": 3, "canaries": 24, "rows_never_drawn": 0}


def test_the_labels_of_canaries_are_wrong_in_the_warm_up_only():
    class Labels(Net):
        def __init__(self):
            super().__init__()
            self.wrong = []

        def training_step(self, batch, batch_idx):
            right = torch.equal(batch[1], NOISY.tensors[1][batch[2]])
            self.wrong.append((self.trainer.current_epoch, not right))
            return super().training_step(batch, batch_idx)

    module, _ = run(watching(), module=Labels())
    epochs = {epoch for epoch, wrong in module.wrong if wrong}
    assert epochs == {0, 1, 2}


def test_a_run_that_resumes_goes_on_with_the_mask(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    first = watching()
    run(first, NOISY, keep, enable_checkpointing=True)
    again = watching()
    seed_all(1)
    trainer = make_trainer(pl.Trainer, again, keep, max_epochs=7, limit_val_batches=0, enable_checkpointing=True)
    module = Net()
    trainer.fit(module, loader(NOISY), ckpt_path=str(tmp_path / "epoch=5.ckpt"))
    assert np.array_equal(again.kept, first.kept)
    assert sorted(module.seen[-1]) == np.flatnonzero(first.kept).tolist()


def test_after_the_run_module_and_trainer_are_as_before():
    module, trainer = run(watching())
    assert "training_step" not in module.__dict__
    assert "setup_data" not in trainer.fit_loop.__dict__
    short, trainer = run(watching(), max_steps=8)  # the warm-up was never over
    assert "training_step" not in short.__dict__
    assert "setup_data" not in trainer.fit_loop.__dict__


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_it_works_with(settings):
    data_filter = watching()
    module, _ = run(data_filter, **settings)
    assert sorted(module.seen[-1]) == np.flatnonzero(data_filter.kept).tolist()
    assert not data_filter.kept.all()


def test_a_checkpoint_of_the_warm_up_has_the_weights_that_its_metric_is_of(tmp_path):
    starts, keep = Starts(), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    run(watching(), NOISY, starts, keep, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]["net.0.weight"]
    assert not torch.equal(saved, starts.weights[0])


def test_a_run_that_ends_with_the_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs=3.*max_epochs=3"):
        run(watching(), epochs=3)


def test_other_filters_and_adversarial_examples_are_refused():
    with pytest.raises(ValueError, match="duplicates cannot judge rows while the run trains"):
        watching(Duplicates())
    with pytest.raises(ValueError, match="warmup_epochs"):
        watching(warmup_epochs=0)
    with pytest.raises(ValueError, match="AdversarialTraining"):
        run(watching(), NOISY, AdversarialTraining(PGD(steps=1), Threat(eps=0.1, low=-9, high=9)))


@pytest.mark.ddp
def test_two_processes_judge_together(tmp_path):
    script = Path(__file__).with_name("filter_during_script.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first["kept"] == second["kept"]
    assert sum(first["kept"]) < N
    assert sorted(first["last"] + second["last"]) == np.flatnonzero(first["kept"]).tolist()
