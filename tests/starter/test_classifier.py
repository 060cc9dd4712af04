from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from robust_train.starter import MLP, Classifier

# Lightning advises workers wherever there are cores for them, and uses a name that newer releases of torch retire.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0.5).long()), batch_size=16)


def network():
    return MLP(shape=(1, 4, 4), classes=2, hidden=(8,))


def trainer(tmp_path, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path, **quiet, **settings})


def test_training_logs_the_usual_names_and_learns(tmp_path):
    torch.manual_seed(0)
    model = Classifier(network(), lr=0.02)
    run = trainer(tmp_path, max_epochs=30, enable_checkpointing=False)
    run.fit(model, loader(), loader())
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(run.callback_metrics)
    assert run.callback_metrics["val/acc"] > 0.9
    assert run.callback_metrics["train/loss"] < 0.4


def test_metrics_weigh_every_example_alike(tmp_path):
    model = Classifier(network())
    (logged,) = trainer(tmp_path).test(model, loader(), verbose=False)
    x, y = loader().dataset.tensors
    logits = model(x)
    assert logged["test/acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert logged["test/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


class LearningRates(pl.Callback):
    def __init__(self):
        self.used = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.used.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedules_are_stretched_over_the_run(tmp_path):
    def used(schedule):
        rates = LearningRates()
        run = trainer(tmp_path, max_epochs=5, limit_train_batches=2, enable_checkpointing=False, callbacks=[rates])
        run.fit(Classifier(network(), lr=0.01, schedule=schedule), loader(), loader())
        return [rate / 0.01 for rate in rates.used]

    assert used("none") == [1] * 10
    cosine, onecycle = used("cosine"), used("onecycle")
    assert cosine[0] == 1
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[5] == pytest.approx(0.5)
    assert max(onecycle) == pytest.approx(1) == onecycle[2]
    assert onecycle[-1] < 1e-3


@pytest.mark.parametrize("schedule", ["none", "cosine", "onecycle"])
def test_sgd_keeps_the_momentum_and_decay_it_is_given(tmp_path, schedule):
    model = Classifier(network(), lr=0.1, weight_decay=0.01, schedule=schedule, optimizer="sgd", momentum=0.8)
    run = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    run.fit(model, loader(), loader())
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("schedule", ["none", "cosine", "onecycle"])
def test_every_schedule_survives_a_run_of_one_step(tmp_path, schedule):
    trainer(tmp_path, fast_dev_run=True).fit(Classifier(network(), schedule=schedule), loader(), loader())


def test_a_schedule_needs_an_end(tmp_path):
    run = trainer(tmp_path, max_epochs=-1, max_time="00:00:00:10")
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        run.fit(Classifier(network(), schedule="cosine"), loader(), loader())


def test_a_checkpoint_holds_weights_and_no_pickled_network(tmp_path):
    model = Classifier(network(), lr=0.02, label_smoothing=0.1)
    run = trainer(tmp_path)
    run.fit(model, loader(), loader())
    path: Path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)

    held = torch.load(path, weights_only=True)["hyper_parameters"]
    assert held == {
        "lr": 0.02,
        "weight_decay": 0.0,
        "schedule": "none",
        "label_smoothing": 0.1,
        "optimizer": "adamw",
        "momentum": 0.0,
    }
    restored = Classifier.load_from_checkpoint(path, network=network())
    x = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(restored(x), model(x))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"weight_decay": -1},
        {"schedule": "linear"},
        {"label_smoothing": 1.0},
        {"optimizer": "adam"},
        {"momentum": 1.0, "optimizer": "sgd"},
        {"momentum": 0.9},  # AdamW has no such setting
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Classifier(network(), **wrong)
