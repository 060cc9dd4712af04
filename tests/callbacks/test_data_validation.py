from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from foreign.batches import BytesToFloats, TupleBatch, named_images, two_views
from foreign.cases import CASES, NAMES
from foreign.data import Records, image_columns, loader, loaders
from foreign.runs import RecordingLogger, Witness, assert_same, fit, make_trainer, portrait, seed_all
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset

from robust_train import DPSGD, PGD, AdversarialTraining, RobustEvaluation, Threat
from robust_train.callbacks._rows import is_through
from robust_train.callbacks.data_validation import DataValidation
from robust_train.poisoning.checks import DataViolation, digests
from robust_train.poisoning.schema import Schema

IMAGES = Schema(shape=(1, 8, 8), low=0.0, high=1.0, constant_rows=False, classes=3, conflicting_labels=False)
OURS = "data/"
pytestmark = [  # the last two are torch.compile's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spoiled(n=20, rows=(5,), value=math.nan, seed=0):
    """Images of which some rows hold a pixel that they should not."""
    x, y = image_columns(n, seed)
    for row in rows:
        x[row, 0, 2, 3] = value
    return x, y


def ordered(x, y, as_batch=None):
    """Training data in the order of the rows, in batches of 8."""
    return {"train_dataloaders": loader(x, y, as_batch=as_batch)}


def run(callback, data, *others, module=TupleBatch, **settings):
    seed_all(0)
    module = module() if isinstance(module, type) else module
    trainer = make_trainer(pl.Trainer, callback, *others, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    trainer.fit(module, **data)
    return module, trainer


class Seen(TupleBatch):
    """Remembers the labels and first pixels of what it trains on."""

    def __init__(self):
        super().__init__()
        self.batches, self.starts, self.ends = [], 0, []

    def on_train_batch_start(self, batch, batch_idx):
        self.starts += 1

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.batches.append((x.clone(), y.clone()))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.ends.append(outputs)


def quarantined(path="validation_quarantine.csv"):
    with open(path) as file:
        return list(csv.DictReader(file))


# --- nothing at fault: nothing changed --------------------------------------------------------------------------------


def trace(found):
    """All that must be the same, but for what the callback itself logs."""
    history = [(step, {k: v for k, v in m.items() if not k.startswith(OURS)}) for step, m in found.logger.history]
    metrics = {k: v for k, v in found.trace["metrics"].items() if not k.startswith(OURS)}
    history = [(step, m) for step, m in history if set(m) - {"epoch"}]
    return {**found.trace, "history": portrait(history), "metrics": metrics}


@pytest.mark.parametrize("name", NAMES)
def test_other_peoples_modules_train_as_without_it(name):
    case = CASES[name]
    mode = "strict" if len(name) % 2 else "quarantine"
    where = {k: v for k, v in case.where.items() if k in ("inputs", "labels")}
    skip = ["balance", "labels"]  # of 20 rows in batches of 8 the second epoch shows labels that the first did not
    validation = DataValidation(infer_batches=2, mode=mode, skip=skip, **where)
    assert_same(trace(fit(case)), trace(fit(case, validation)))
    assert validation.violations == 0
    assert validation._schema is not None


@pytest.mark.parametrize(
    "settings", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"precision": "64-true"}]
)
@pytest.mark.parametrize("name", ["nasty", "manual_accumulation"])
def test_it_changes_nothing_in_other_trainers(name, settings):
    case = CASES[name]
    if name.startswith("manual"):
        settings = {k: v for k, v in settings.items() if not k.startswith("accumulate")}
    validation = DataValidation(trusted=Records(*image_columns()), inputs=0, labels=1)
    assert_same(trace(fit(case, **settings)), trace(fit(case, validation, **settings)))


def test_a_trusted_loader_that_draws_leaves_no_trace():
    x, y = image_columns(40, seed=3)
    trusted = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    validation = DataValidation(trusted=trusted)
    assert_same(trace(fit(CASES["nasty"])), trace(fit(CASES["nasty"], validation)))


@pytest.mark.parametrize("rows", [(), (5,)])
def test_module_and_trainer_are_as_before_also_after_a_failure(rows):
    after = []
    for callbacks in ([], [DataValidation(IMAGES)]):
        module, trainer = TupleBatch(), make_trainer(pl.Trainer, *callbacks, limit_val_batches=0, max_epochs=1)
        with pytest.raises(DataViolation) if rows and callbacks else nullcontext():
            trainer.fit(module, **ordered(*spoiled(rows=rows)))
        after.append((vars(trainer.strategy).keys(), vars(module).keys()))
    assert after[0] == after[1]


# --- strict -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "finite": lambda x, y: x[9, 0, 0, 0].fill_(math.nan),
    "range": lambda x, y: x[9, 0, 0, 0].fill_(1.5),
    "constant": lambda x, y: x[9].fill_(0.5),
    "labels": lambda x, y: y[9].fill_(7),
    "conflicts": lambda x, y: (x[9].copy_(x[0]), y[9].fill_(2)),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_strict_stops_before_the_step_and_names_batch_rule_and_row(rule):
    x, y = image_columns()
    FAULTS[rule](x, y)
    module = Seen()
    said = f"training batch 1 in epoch 0 does not fit the schema: {rule}: .*rows 1"
    with pytest.raises(DataViolation, match=said) as error:
        run(DataValidation(IMAGES), ordered(x, y), module=module)
    assert error.value.violations[0].rows == (1,)
    assert (len(module.batches), module.starts) == (1, 1)
    run(DataValidation(IMAGES, skip=[rule]), ordered(x, y), module=NoLoss)


class NoLoss(TupleBatch):
    """Does not look at its labels."""

    def training_step(self, batch, batch_idx):
        return self(batch[0].nan_to_num()).square().mean()


def test_dtype_and_shape_are_checked_as_the_step_sees_them():
    x, y = image_columns()
    with pytest.raises(DataViolation, match="training batch 0 .* dtype: float64, expected float32"):
        run(DataValidation(replace(IMAGES, dtype="float32")), ordered(x.double(), y))
    with pytest.raises(DataViolation, match=r"shape: rows of shape \(1, 8, 8\), expected \(1, any, 9\)"):
        run(DataValidation(Schema(shape=(1, None, 9))), ordered(x, y))
    case = replace(CASES["transfer_hook"])
    seen = fit(case, DataValidation(Schema(dtype="float32", low=0.0, high=1.0)), max_epochs=1)  # bytes before the hook
    assert seen.trainer.global_step > 0


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_schema_holds_in_every_precision(precision):
    data = {k: loader(*image_columns()) for k in ("train_dataloaders", "val_dataloaders")}
    run(DataValidation(replace(IMAGES, dtype="float32")), data, precision=precision, limit_val_batches=1.0)
    validation = DataValidation(trusted=Records(*image_columns()))
    run(validation, data, precision=precision, limit_val_batches=1.0)
    assert validation.violations == 0


def test_class_shares_are_tested_at_the_end_of_the_epoch():
    x, y = image_columns(60)
    schema = Schema(classes=3, shares=(1 / 3,) * 3, share_tolerance=0.1)
    run(DataValidation(schema), ordered(x, y))
    flipped = torch.where(torch.arange(60) % 10 < 6, 0, y)
    with pytest.raises(DataViolation, match="rows of epoch 0 .*balance: class 0 has a share of 0.7"):
        run(DataValidation(schema), ordered(x, flipped))
    run(DataValidation(schema, skip=["balance"]), ordered(x, flipped))
    validation = DataValidation(schema, mode="quarantine")
    with pytest.warns(UserWarning, match="balance: class 0"):
        _, trainer = run(validation, ordered(x, flipped))
    assert trainer.callback_metrics["data/violations"] == 1
    assert validation.left_out == 0


def test_conflicts_are_looked_for_within_an_epoch_only():
    x, y = image_columns()
    validation = DataValidation(IMAGES)
    run(validation, ordered(x, y), max_epochs=3)
    assert validation.violations == 0


@pytest.mark.parametrize("check_val", [True, False])
def test_validation_batches_are_checked_too(check_val):
    data = {**ordered(*image_columns()), "val_dataloaders": [loader(*image_columns()), loader(*spoiled(rows=(17,)))]}

    class Quiet(TupleBatch):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_rows", float(len(batch[0])), reduce_fx="sum")

    settings = {"limit_val_batches": 1.0, "module": Quiet}
    if not check_val:
        run(DataValidation(IMAGES, check_val=False), data, **settings)
        return
    with pytest.raises(DataViolation, match="validation batch 2 of loader 1 in epoch 0 .*finite.*rows 1"):
        run(DataValidation(IMAGES), data, **settings, num_sanity_val_steps=0)
    _, trainer = run(DataValidation(IMAGES, mode="quarantine"), data, **settings)
    assert trainer.callback_metrics["val_rows/dataloader_idx_0"] == 20
    assert trainer.callback_metrics["val_rows/dataloader_idx_1"] == 19
    assert trainer.callback_metrics["data/violations"] == 1
    data["val_dataloaders"] = loader(*spoiled(rows=range(8)))
    with pytest.raises(DataViolation, match="validation batch 0 .*no row is left"):
        run(DataValidation(IMAGES, mode="quarantine"), data, **settings)


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_rows_at_fault_are_left_out_and_listed():
    x, y = spoiled(rows=(5, 9))
    y[17] = 8
    module, validation = Seen(), DataValidation(IMAGES, mode="quarantine")
    _, trainer = run(validation, ordered(x, y), module=module)
    good = [i for i in range(20) if i not in (5, 9, 17)]
    assert torch.equal(torch.cat([b[0] for b in module.batches]), x[good])
    assert torch.equal(torch.cat([b[1] for b in module.batches]), y[good])
    assert [len(b[0]) for b in module.batches] == [7, 7, 3]
    rows = quarantined()
    assert [(r["stage"], r["epoch"], r["batch"], r["row"], r["rules"], r["label"]) for r in rows] == [
        ("training", "0", "0", "5", "finite", "2"),
        ("training", "0", "1", "1", "finite", "0"),
        ("training", "0", "2", "1", "labels", "8"),
    ]
    assert [r["sha256"] for r in rows] == [d.hex() for d in digests(x[[5, 9, 17]])]
    assert trainer.callback_metrics["data/violations"] == 3
    assert (validation.violations, validation.left_out) == (3, 3)
    assert all(torch.isfinite(w).all() for w in module.state_dict().values())


def test_training_equals_that_on_the_good_rows_alone():
    x, y = spoiled(24, rows=(1, 10, 20))
    good = [i for i in range(24) if i not in (1, 10, 20)]
    module, _ = run(DataValidation(IMAGES, mode="quarantine"), ordered(x, y), max_epochs=2)

    class Unequal(DataLoader):
        def __iter__(self):
            return iter([(x[p], y[p]) for p in (good[:7], good[7:14], good[14:])])

    seed_all(0)
    twin = TupleBatch()
    make_trainer(pl.Trainer, max_epochs=2, limit_val_batches=0).fit(twin, Unequal(Records(x, y), batch_size=8))
    assert_same(portrait(module), portrait(twin))


@dataclass
class Rich:
    """A batch by somebody else."""

    target: torch.Tensor
    image: torch.Tensor
    names: list[str]
    scale: float = 2.0


BATCHES = {
    "tuple": (None, lambda b: (b[0], b[1])),
    "dict": (named_images, lambda b: (b["image"], b["label"])),
    "nested": (two_views, lambda b: (b["views"][0], b["meta"]["label"])),
    "dataclass": (lambda x, y: Rich(y, x, [str(i) for i in range(len(x))]), lambda b: (b.image, b.target)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_rows_are_taken_out_of_batches_of_every_structure(kind):
    as_batch, parts = BATCHES[kind]
    seen = []

    class Module(TupleBatch):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(parts(batch), batch_idx)

    x, y = spoiled(rows=(5,))
    where = {"inputs": "views.0"} if kind == "nested" else {}
    run(DataValidation(IMAGES, mode="quarantine", **where), ordered(x, y, as_batch), module=Module())
    assert [tuple(map(len, parts(b))) for b in seen] == [(7, 7), (8, 8), (4, 4)]
    if kind == "dict":
        assert seen[0]["name"] == [f"image {i}" for i in range(8) if i != 5]
    if kind == "nested":
        assert seen[0]["meta"]["id"] == [str(i) for i in range(8) if i != 5]
        assert len(seen[0]["views"][1]) == 7
    if kind == "dataclass":
        assert (seen[0].names, seen[0].scale) == ([str(i) for i in range(8) if i != 5], 2.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_a_good_row_is_left_out(accumulate):
    x, y = spoiled(24, rows=range(8, 16))
    validation = DataValidation(IMAGES, mode="quarantine")
    module, trainer = run(validation, ordered(x, y), module=Seen, accumulate_grad_batches=accumulate)
    assert [len(b[0]) for b in module.batches] == [8, 8]
    assert module.starts == len(module.ends) == 3
    assert not module.ends[1]
    assert len(quarantined()) == 8
    assert "training_step" not in vars(module)

    class Skips(TupleBatch):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    seed_all(0)
    twin = Skips()
    other = make_trainer(pl.Trainer, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=accumulate)
    other.fit(twin, loader(x, y))
    assert_same(portrait(module.state_dict()), portrait(twin.state_dict()))
    assert trainer.global_step == other.global_step


@pytest.mark.parametrize("name", ["manual_accumulation", "manual_closure"])
def test_manual_optimization_goes_on_without_a_bad_batch(name):
    x, y = spoiled(24, rows=range(8, 16))
    module = CASES[name].module()
    run(DataValidation(IMAGES, mode="quarantine"), ordered(x, y), module=module)
    assert all(torch.isfinite(w).all() for w in module.state_dict().values())


def test_adversarial_training_sees_good_rows_only():
    x, y = spoiled(24, rows=(3, *range(8, 16)), value=7.0)
    hardened = AdversarialTraining(PGD(steps=1), Threat(eps=0.1))  # would refuse values beyond 1
    pair = [DataValidation(IMAGES, mode="quarantine"), hardened]
    weights = []
    for one, other in (pair, pair[::-1]):
        module, _ = run(one, ordered(x, y), other, module=Seen)
        assert "training_step" not in vars(module)
        assert {len(b[0]) for b in module.batches} == {7, 8}
        weights.append(portrait(module.state_dict()))
    assert weights[0] == weights[1]


def test_nothing_is_written_where_nothing_of_a_run_is_kept(tmp_path):
    run(DataValidation(IMAGES, mode="quarantine"), ordered(*spoiled()), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_the_dataset_is_never_written_to():
    x, y = spoiled(rows=(3,))
    before = x.clone(), y.clone()
    run(DataValidation(IMAGES, mode="quarantine"), ordered(x, y))
    assert portrait([x, y]) == portrait(list(before))


# --- where the schema comes from --------------------------------------------------------------------------------------


def test_without_trusted_data_the_first_batches_are_trusted_and_it_says_so(caplog):
    x, y = image_columns(60)
    validation = DataValidation(infer_batches=4)
    run(validation, ordered(x, y))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["first 4 training batches are assumed to be trustworthy" in text for text in said] == [True]
    found = Schema.read("data_schema.yaml")
    assert "first 32 training rows, on the assumption that they are trustworthy" in found.source
    assert found == validation._schema
    assert (found.dtype, found.shape, found.low, found.high) == ("float32", (1, 8, 8), 0.0, 1.0)
    assert found.classes == (0, 1, 2)
    run(DataValidation("data_schema.yaml"), ordered(x, y))
    with pytest.raises(DataViolation, match="range"):
        run(DataValidation("data_schema.yaml"), ordered(*spoiled(60, value=1.2)))


def test_from_the_batch_after_the_trusted_ones_on_all_are_checked():
    with pytest.raises(DataViolation, match="training batch 2 .*range: values from .* to 3"):
        run(DataValidation(infer_batches=2), ordered(*spoiled(60, rows=(17,), value=3.0)))
    with pytest.raises(DataViolation, match="training batch 0 .*finite"):  # before, too
        run(DataValidation(infer_batches=2), ordered(*spoiled(60)))
    module = Seen()
    run(DataValidation(infer_batches=2, mode="quarantine"), ordered(*spoiled(60)), module=module)
    assert len(module.batches[0][0]) == 7


def test_an_epoch_that_is_shorter_than_what_is_asked_for_is_enough():
    validation = DataValidation(infer_batches=100)
    run(validation, ordered(*image_columns(60)))
    assert "60 training rows" in validation._schema.source


@pytest.mark.parametrize("kind", ["dataset", "loader", "list"])
def test_trusted_data_of_every_kind(kind):
    x, y = image_columns(60, seed=4)
    order = y.argsort()  # sorted by class: rows spread over the dataset show them all
    trusted = {
        "dataset": TensorDataset(x[order], y[order]),
        "loader": DataLoader(TensorDataset(x, y), batch_size=30),
        "list": [(x[:30], y[:30]), (x[30:], y[30:])],
    }[kind]
    validation = DataValidation(trusted=trusted, infer_batches=2)
    with pytest.raises(DataViolation, match="training batch 0 .*range"):
        run(validation, ordered(*spoiled(value=1.2)))
    found = Schema.read("data_schema.yaml")
    assert found.classes == (0, 1, 2)
    assert found.source == "inferred from 60 rows of trusted data"


def test_trusted_data_pass_the_users_hooks():
    x, y = image_columns(60, seed=4)
    trusted = [((x * 255).byte(), y)]
    validation = DataValidation(trusted=trusted)
    seed_all(0)
    make_trainer(pl.Trainer, validation).fit(TupleBatch(), datamodule=BytesToFloats())
    assert (validation._schema.dtype, validation._schema.high) == ("float32", 1.0)


def test_trusted_data_must_not_be_broken():
    with pytest.raises(ValueError, match="trusted inputs hold NaN"):
        run(DataValidation(trusted=Records(*spoiled())), ordered(*image_columns()))


def test_what_is_active_and_what_is_checked_is_said(caplog):
    logger = RecordingLogger()
    with caplog.at_level("INFO"):
        run(DataValidation(IMAGES), ordered(*image_columns()), logger=logger)
    assert "DataValidation: active, strict. any dtype (1, 8, 8) in [0, 1]; 3 classes." in caplog.text
    assert "DataValidation: checks inputs [0], labels [1] of the training batches." in caplog.text
    assert logger.hyperparams["robust_train/DataValidation"]["schema"]["classes"] == [0, 1, 2]


# --- interrupted and resumed ------------------------------------------------------------------------------------------


class Interrupted(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            raise RuntimeError("power failure")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_goes_on_with_its_schema_and_counts(tmp_path, caplog):
    x, y = spoiled(40, rows=(30,))

    def saving():
        return ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)

    first = DataValidation(infer_batches=3, mode="quarantine")
    with pytest.raises(RuntimeError, match="power failure"):
        run(first, ordered(x, y), saving(), Interrupted(), enable_checkpointing=True)
    (path,) = (tmp_path / "saved").iterdir()
    second = DataValidation(infer_batches=3, mode="quarantine")
    seed_all(0)
    trainer = make_trainer(pl.Trainer, second, saving(), enable_checkpointing=True, max_epochs=2, limit_val_batches=0)
    caplog.clear()
    trainer.fit(TupleBatch(), **ordered(x, y), ckpt_path=path, weights_only=True)
    assert "no trusted data were given" not in caplog.text
    assert second._schema == first._schema
    assert second.left_out >= 2  # once before, once in the second epoch
    state = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    assert state["counts"] == {0: 10, 1: 11, 2: 10}
    assert (state["violations"], state["left_out"], state["settings"]["mode"]) == (1, 1, "quarantine")


# --- several loaders --------------------------------------------------------------------------------------------------


class TwoLoaders(TupleBatch):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append((len(batch["a"][0]), len(batch["b"][0])))
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


def test_each_of_several_loaders_is_checked_by_a_validation_of_its_own():
    data = {"train_dataloaders": {"a": loader(*spoiled(16)), "b": loader(*spoiled(16, rows=(1, 2, 9)))}}
    with pytest.raises(ValueError, match="training batches come from several: add one DataValidation for each"):
        run(DataValidation(IMAGES), data, module=TwoLoaders())
    module = TwoLoaders()
    both = [DataValidation(IMAGES, mode="quarantine", inputs=f"{k}.0", name=k, check_val=False) for k in "ab"]
    _, trainer = run(both[0], data, both[1], module=module)
    assert module.sizes == [(7, 6), (8, 7)]
    assert [len(quarantined(f"validation_quarantine_{k}.csv")) for k in "ab"] == [1, 3]
    assert (trainer.callback_metrics["data/a/violations"], trainer.callback_metrics["data/b/violations"]) == (1, 3)
    with pytest.raises(DataViolation, match="finite"):
        run(DataValidation(IMAGES, inputs="b.0", check_val=False), data, module=TwoLoaders())


def test_a_loader_that_is_through_is_left_alone():
    each = {"a": object(), "b": object()}
    assert is_through({"a": None, "b": (1, 2)}, "a.0", each)
    assert not is_through({"a": None, "b": (1, 2)}, "b.0", each)

    class Longest(TupleBatch):
        def training_step(self, batch, batch_idx):
            return sum(super(Longest, self).training_step(part, batch_idx) for part in batch.values() if part)

    combined = CombinedLoader({"a": loader(*image_columns(8)), "b": loader(*image_columns(24))}, "max_size")
    validation = DataValidation(IMAGES, inputs="a.0", check_val=False)
    run(validation, {"train_dataloaders": combined}, module=Longest())


def test_two_validations_agree_on_a_batch_to_be_left_out():
    x, y = spoiled(24, rows=range(8, 16))
    module = Seen()
    validations = [DataValidation(IMAGES, mode="quarantine", name=name) for name in ("one", "two")]
    run(validations[0], ordered(x, y), validations[1], module=module)
    assert len(module.batches) == 2
    assert "training_step" not in vars(module)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "drop"}, "data_validation.mode must be one of strict, quarantine, got 'drop'"),
        ({"infer_batches": 0}, "data_validation.infer_batches must be a whole number >= 1, got 0"),
        ({"remember_rows": 1.5}, "data_validation.remember_rows must be a whole number >= 1"),
        ({"skip": ["balance", "colour"]}, r"data_validation.skip must be a list of rules .*got \['colour'\]"),
        ({"skip": "colour"}, "data_validation.skip must be a list of rules"),
        ({"schema": 3}, "data_validation.schema must be a path, a Schema or 'infer', got 3"),
        ({"schema": "no.yaml"}, "no.yaml: No such file"),
        ({"schema": Schema(), "trusted": []}, 'data_validation.trusted .* needs schema="infer"'),
    ],
)
def test_settings_are_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DataValidation(**settings)


def test_two_validations_need_names():
    with pytest.raises(ValueError, match="two DataValidation callbacks with name=''"):
        run(DataValidation(IMAGES), ordered(*image_columns()), type("Other", (DataValidation,), {})(IMAGES))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"inputs": "image"}, "cannot read a training batch: inputs='image' names no tensor"),
        ({"labels": 5}, "cannot read a training batch: labels=5 names no tensor"),
        ({"inputs": 1, "labels": 2}, "the inputs have 8 rows, and the labels the shape"),
    ],
)
def test_a_batch_that_cannot_be_read_is_an_error(where, message):
    def as_batch(x, y):
        return x, y, torch.tensor(3.0)

    with pytest.raises(ValueError, match=message):
        run(DataValidation(Schema(), **where), ordered(*image_columns(), as_batch))


def test_a_step_that_fetches_its_own_batches_is_refused():
    class Fetches(TupleBatch):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    with pytest.raises(ValueError, match="training_step.self, dataloader_iter"):
        run(DataValidation(IMAGES), ordered(*image_columns()), module=Fetches())


class Private(TupleBatch):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schema": IMAGES, "mode": "quarantine"}, 'mode="quarantine". cannot work with DPSGD.*Use mode="strict"'),
        ({}, 'schema="infer". cannot work with DPSGD.*Give trusted='),
        ({"trusted": []}, r"rules balance and conflicts cannot work with DPSGD.*skip=\['balance', 'conflicts'\]"),
        ({"schema": IMAGES}, r"rules conflicts cannot work with DPSGD.*skip=\['conflicts'\]"),
    ],
)
def test_what_would_void_differential_privacy_is_refused(settings, message):
    for order in (False, True):
        pair = [DataValidation(**settings), DPSGD(noise_multiplier=1.0, accountant="rdp")]
        one, other = pair[::-1] if order else pair
        with pytest.raises(ValueError, match=message):
            run(one, ordered(*image_columns()), other, module=Private)


def test_strict_rules_of_single_rows_work_with_differential_privacy():
    def private():
        return DPSGD(noise_multiplier=1.0, accountant="rdp", unsafe_seed=0)

    weights = []
    for others in ([], [DataValidation(IMAGES, skip=["conflicts"])]):
        with pytest.warns(UserWarning, match="certificate is void: unsafe_seed"):
            module, _ = run(private(), ordered(*image_columns()), *others, module=Private)
        weights.append(portrait(module.state_dict()))
    assert weights[0] == weights[1]
    with (
        pytest.warns(UserWarning, match="certificate is void"),
        pytest.raises(DataViolation, match="finite"),
    ):
        run(private(), ordered(*spoiled(rows=range(20))), DataValidation(IMAGES, skip=["conflicts"]), module=Private)


def test_evaluation_goes_on_beside_it():
    validation = DataValidation(IMAGES)
    evaluation = RobustEvaluation(PGD(steps=1), Threat(eps=0.1))
    witness = Witness()
    seed_all(0)
    trainer = make_trainer(pl.Trainer, validation, evaluation, witness, max_epochs=1)
    trainer.fit(TupleBatch(), **loaders(image_columns))
    assert {"val/robust_acc", "data/violations"} <= trainer.callback_metrics.keys()


# --- several processes ------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, warnings, torch, pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
sys.path.insert(0, {tests!r})
from foreign.batches import TupleBatch
from foreign.data import image_columns, loader
from foreign.runs import make_trainer, seed_all
from robust_train.callbacks.data_validation import DataValidation
warnings.simplefilter("ignore")
torch.set_num_threads(1)
mode, bad = sys.argv[1], [int(row) for row in sys.argv[2].split(",") if row]
x, y = image_columns(48)
x[bad, 0, 2, 3] = 3.0
seed_all(0)
callbacks = [] if mode == "none" else [DataValidation(infer_batches=1, mode=mode)]
strategy = DDPStrategy(process_group_backend="gloo")
trainer = make_trainer(pl.Trainer, *callbacks, strategy=strategy, devices=2, use_distributed_sampler=False)
module, rank = TupleBatch(), int(os.environ.get("LOCAL_RANK", 0))
trainer.fit(module, loader(x[rank::2], y[rank::2]))
found = {{"weights": module.state_dict(), "metrics": dict(trainer.callback_metrics), "steps": trainer.global_step}}
if callbacks:
    found["schema"] = callbacks[0]._schema.to_dict()
torch.save(found, f"out.{{trainer.global_rank}}")
torch.distributed.destroy_process_group()
"""


def launch(path, mode, bad=""):
    script = path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent.parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), mode, bad]
    return subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, timeout=120)


@pytest.mark.ddp
def test_ranks_infer_one_schema_and_clean_data_train_as_ever(tmp_path):
    found = {}
    for mode in ("none", "strict"):
        done = launch(tmp_path, mode)
        assert done.returncode == 0, done.stderr[-3000:]
        found[mode] = [torch.load(tmp_path / f"out.{rank}") for rank in (0, 1)]
    assert_same(*(portrait([r["weights"] for r in found[mode]]) for mode in ("none", "strict")))
    assert found["strict"][0]["schema"] == found["strict"][1]["schema"]
    assert "16 training rows" in found["strict"][0]["schema"]["source"]


@pytest.mark.ddp
def test_a_fault_on_one_rank_ends_all(tmp_path):
    """Odd rows come to rank 1; row 33 is the first of its third batch."""
    done = launch(tmp_path, "strict", "33")
    assert done.returncode != 0
    assert "training batch 2 in epoch 0 does not fit the schema: range: " in done.stderr


@pytest.mark.ddp
def test_ranks_leave_out_rows_of_their_own_and_stop_where_none_is_left(tmp_path):
    done = launch(tmp_path, "quarantine", "32,33,35")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    assert {len(quarantined(tmp_path / f"validation_quarantine{rank}.csv")) for rank in ("", "_rank1")} == {
        2,
        4,
    }  # in two epochs
    assert first["metrics"]["data/violations"] == second["metrics"]["data/violations"] == 3
    assert first["steps"] == second["steps"] == 6
    trained = [{k: v for k, v in r["weights"].items() if "running" not in k} for r in (first, second)]
    assert_same(portrait(trained[0]), portrait(trained[1]))
    done = launch(tmp_path, "quarantine", ",".join(str(row) for row in range(33, 48, 2)))
    assert done.returncode != 0
    assert "one process cannot leave out a step that the others wait for" in done.stderr


def test_the_balance_is_held_against_a_manifest(tmp_path):
    from robust_train.custody.manifest import Manifest

    x, y = image_columns(120, 0)
    path = tmp_path / "manifest.json"
    Manifest.of(TensorDataset(x, y), label_of=lambda example: int(example[1])).write(path)
    schema = replace(IMAGES, share_tolerance=0.02)
    run(DataValidation(schema, manifest=str(path)), ordered(x, y))
    with pytest.raises(DataViolation, match="balance|share"):
        run(DataValidation(schema, manifest=str(path)), ordered(x, torch.zeros_like(y)))


def test_a_manifest_without_classes_is_refused(tmp_path):
    from robust_train.custody.manifest import Manifest

    x, y = image_columns(20, 0)
    Manifest.of(TensorDataset(x, y)).write(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match="no counts of classes"):
        run(DataValidation(IMAGES, manifest=str(tmp_path / "manifest.json")), ordered(x, y))
