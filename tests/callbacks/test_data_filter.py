from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from filter_kit import (
    BAD,
    BRIEF,
    WIDTH,
    Data,
    Marked,
    N,
    Net,
    checkpointed,
    flipped,
    idle,
    loader,
    marking,
    report,
    run,
    table,
    trace,
)
from foreign.batches import TupleBatch
from foreign.cases import CASES, NAMES
from foreign.data import image_columns
from foreign.data import loader as image_loader
from foreign.runs import RecordingLogger, assert_same, fit, make_trainer, seed_all
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.connectors import callback_connector
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.compile import from_compiled
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from robust_train import DataFilter, Policy
from robust_train.callbacks import _filtering
from robust_train.callbacks._filter_files import Mask
from robust_train.callbacks._inner import throwaway_copy
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.filters.isolated_groups import IsolatedGroups
from robust_train.poisoning.quarantine import Quarantine
from robust_train.poisoning.records import read_decisions

pytestmark = [  # the first two are torch.compile's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection:UserWarning"),
]
GOOD = sorted(set(range(N)) - set(BAD))


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


# --- nothing left out: nothing changed -----------------------------------------------------------------------------

NOT_JUDGED = {
    "gan": "found no logits",
    "segmentation": r"labels have shape \(8, 8, 8\)",
    "regression": "found no logits",
    "soft_labels": r"labels have shape \(8, 3\)",
}


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
            "sampler": {
                "sampler": RandomSampler(y, True, 30, generator=torch.Generator().manual_seed(6)),
            },
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


def test_the_copy_of_a_compiled_module_runs_as_it_was_written():
    module = Net()
    compiled = torch.compile(module, backend="eager")
    copied = throwaway_copy(from_compiled(compiled))
    assert copied.training_step.__self__ is copied
    assert copied.training_step.__func__ is Net.training_step
    assert "forward" not in vars(copied)


def test_a_function_that_the_module_holds_refers_to_the_copys_own_parts_in_the_copy():
    class Closures(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scores = lambda x: self.net(x)
            self.maps = []
            self.net[0].register_forward_hook(lambda module, args, output: self.maps.append(output.detach()))

        def forward(self, x):
            return self.scores(x)

    module = Closures()
    copied = throwaway_copy(module)
    copied(torch.rand(4, WIDTH)).sum().backward()
    assert not module.maps
    assert len(copied.maps) == 1
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in copied.parameters())
    assert_same(trace_of(Closures), trace_of(Closures, idle()))


def trace_of(kind, *callbacks):
    torch.manual_seed(0)
    return trace(fit(CASES["tuple"], *callbacks, module=kind(), data={"train_dataloaders": loader(table())}))


def test_a_copy_that_still_reaches_the_module_is_refused():
    class Shares(Net):
        def __init__(self) -> None:
            super().__init__()
            self.keep = Holder(self.net)

        def forward(self, x):
            return self.keep.module(x)

    class Holder:
        def __init__(self, module) -> None:
            self.module = module

        def __deepcopy__(self, memo):
            return self

    with pytest.raises(ValueError, match="changed the module itself.*Make it a method"):
        run(DataFilter([AUM()], probe=BRIEF), module=Shares())


def test_a_module_that_cannot_be_copied_is_refused():
    module = Net()
    module.lines = (line for line in "abc")
    with pytest.raises(ValueError, match="a copy of Net is to be trained, and it cannot be copied: .*generator.*Keep"):
        run(idle(), module=module)


def test_data_that_the_module_holds_are_not_copied_with_it():
    class Opened(TensorDataset):
        def __deepcopy__(self, memo):
            raise TypeError("an open file")

    module = Net()
    module.dataset = Opened(*table().tensors)
    run(callback := idle(), module.dataset, module=module)
    assert throwaway_copy(module).dataset is module.dataset
    assert callback.kept.all()


def test_nothing_of_the_probe_remains():
    class Looking(Net):
        def on_train_start(self):
            self.state_then = surroundings(self)

    def surroundings(module):
        trainer = module.trainer
        hooks = [len(h) for m in module.modules() for n, h in vars(m).items() if n.endswith("_hooks") and h is not None]
        return {
            "handlers": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGUSR1)},
            "rank": rank_zero_only.rank,
            "logger": trainer.logger is not None and trainer.logger.save_dir,
            "dtype": torch.get_default_dtype(),
            "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
            "precision": torch.get_float32_matmul_precision(),
            "environment": dict(os.environ),
            "gradients": torch.is_grad_enabled(),
            "module": sorted(set(vars(module)) - {"state_then"}),
            "children": [type(m).__name__ for m in module.modules()],
            "hooks": hooks,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("filter/")},
            "loops": (trainer.global_step, trainer.current_epoch, trainer.num_training_batches, trainer.should_stop),
        }

    found, after = [], []
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    try:
        for callbacks in ([], [idle()]):
            torch.manual_seed(0)
            found.append(module := Looking())
            logger = RecordingLogger("runs")
            run(
                callbacks[0] if callbacks else None,
                module=module,
                deterministic=True,
                precision="64-true",
                logger=logger,
            )
            after.append((surroundings(module), sorted(vars(module.trainer.strategy)), dict(logger.hyperparams)))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert found[0].state_then == found[1].state_then
    assert_same(*({k: str(v) for k, v in s.items()} for s, *_ in after))
    assert after[0][1] == after[1][1]
    assert list(after[1][2]) == ["robust_train/DataFilter"]
    ours = {"filter_report.json", "filter_report.html", "filter_decisions.csv", "filter_mask.json", "quarantine.json"}
    assert {p.name for p in Path("runs").iterdir()} == ours
    assert {p.name for p in Path().iterdir()} == {"runs"}


def test_a_trainer_of_ones_own_and_callbacks_from_the_environment_do_not_reach_the_probe(monkeypatch, probes):
    class Own(pl.Trainer):
        def __init__(self, callback) -> None:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            super().__init__(accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, **quiet)

    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda group: [FromElsewhere()])
    FromElsewhere.trained = 0
    callback = idle()
    Own(callback).fit(Net(), loader(table()))
    assert FromElsewhere.trained == 1
    assert len(probes) == 1


class FromElsewhere(pl.Callback):
    trained = 0

    def on_train_start(self, trainer, pl_module):
        type(self).trained += 1


# --- which rows are trained on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["loader", "data module", "module"])
@pytest.mark.parametrize("settings", [{}, {"num_workers": 2, "persistent_workers": True}, {"drop_last": True}], ids=str)
def test_no_row_that_is_left_out_is_trained_on_and_no_other_is_lost(source, settings):
    module = Net()
    if source == "module":
        module.train_dataloader = lambda: loader(table(), **settings)
    data = {"loader": loader(table(), **settings), "data module": Data(table(), **settings), "module": None}[source]
    callback = marking()
    if data is None:
        make_trainer(pl.Trainer, callback, limit_val_batches=0).fit(module)
    else:
        run(callback, data, module=module, max_epochs=2)
    assert np.flatnonzero(~callback.kept).tolist() == list(BAD)
    for rows in module.seen:
        assert set(rows) <= set(GOOD)
        assert len(rows) == len(set(rows)) == (len(GOOD) // 16 * 16 if settings.get("drop_last") else len(GOOD))
    assert module.seen[0] != module.seen[1]


class OneCycle(Net):
    def configure_optimizers(self):
        self.total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("reload", [0, 1])
def test_the_number_of_steps_is_that_of_the_rows_that_are_kept(reload):
    module, data = OneCycle(), Data(table())
    callback = marking(range(100))
    _, trainer = run(
        callback, data, module=module, max_epochs=3, reload_dataloaders_every_n_epochs=reload, limit_val_batches=1.0
    )
    assert module.total == trainer.global_step == 3 * -(-140 // 16)
    assert [sorted(rows) for rows in module.seen] == [list(range(100, N))] * 3
    assert module.validated == 3 * 2 + 2
    assert float(trainer.callback_metrics["filter/kept"]) == 140
    assert data.requests == (4 if reload else 2)


def test_rows_are_left_out_also_where_the_loader_was_asked_for_earlier():
    class Early(Net):
        def setup(self, stage):
            self.total = self.trainer.estimated_stepping_batches

    module, _ = run(marking(range(100)), module=Early())
    assert sorted(module.seen[0]) == list(range(100, N))


def two_loaders(n_b=64):
    return {"a": loader(table()), "b": loader(table(n_b, seed=4))}


class TwoLoaders(Net):
    def training_step(self, batch, batch_idx):
        self.extra = [*getattr(self, "extra", []), *batch["b"][2].tolist()]
        return super().training_step(batch["a"], batch_idx) + 0.1 * F.cross_entropy(self(batch["b"][0]), batch["b"][1])


@pytest.mark.parametrize("combined", [False, True])
def test_one_of_several_loaders_is_filtered(combined, probes):
    data = two_loaders()
    data = CombinedLoader(data, "max_size_cycle") if combined else data
    module = TwoLoaders()
    callback = DataFilter({"marked": Marked(BAD), "aum": AUM()}, probe=BRIEF, loader="a", inputs="0", labels="1")
    run(callback, data, module=module)
    assert probes
    assert not set(module.seen[0]) & set(BAD)
    assert set(np.flatnonzero(callback.kept)) == set(module.seen[0])
    assert set(module.extra) == set(range(64))


def test_the_other_loaders_draw_what_they_would_draw_otherwise():
    traces = []
    for callbacks in ([], [idle(loader="a")]):
        torch.manual_seed(0)
        data = two_loaders()
        data["b"] = loader(
            table(64, seed=4), generator=torch.Generator().manual_seed(2), num_workers=1, persistent_workers=True
        )
        found = fit(CASES["tuple"], *callbacks, module=TwoLoaders(), data={"train_dataloaders": data})
        traces.append(trace(found))
    assert_same(*traces)


@pytest.mark.parametrize("which", [None, "c"])
def test_which_loader_must_be_said(which):
    said = (
        r"2 train loaders \(a, b\): say which" if which is None else "loader='c' names none of the train loaders: a, b"
    )
    with pytest.raises(ValueError, match=said):
        run(marking(loader=which), two_loaders(), module=TwoLoaders())


def test_loaders_without_names_have_numbers():
    with pytest.raises(ValueError, match=r"^DataFilter: there are 2 train loaders \(0, 1\): say which"):
        run(marking(), [loader(table()), loader(table())])
    with pytest.raises(ValueError, match=r"^data_filter.loader='a' names none .*: there is one, which has no name"):
        run(marking(loader="a"))


def test_a_folder_without_a_mask_is_named_once():
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="^data_filter.mask: empty/filter_mask.json: there is no such file$"):
        run(DataFilter(mask="empty"))


def test_a_second_fit_keeps_the_mask_and_refuses_other_data(probes):
    callback, module = DataFilter([AUM()], probe=BRIEF), Net()
    data, _ = flipped(table())
    _, trainer = run(callback, data, module=module)
    kept, count = callback.kept.copy(), len(probes)
    assert not kept.all()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(data))
    assert len(probes) == count
    assert set(module.seen[-1]) == set(np.flatnonzero(kept))
    with pytest.raises(ValueError, match="made for 240 rows with root .* 100 rows with root .*with a new DataFilter"):
        trainer.fit(module, loader(table(100)))
    with pytest.raises(ValueError, match="made for 240 rows"):
        run(callback, table(seed=1))


def test_it_works_again_after_a_fit_that_failed():
    class Fails(Net):
        fail = True

        def on_train_start(self):
            if self.fail:
                raise RuntimeError("stop here")

    module, callback = Fails(), marking()
    trainer = make_trainer(pl.Trainer, callback, limit_val_batches=0, max_epochs=1)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(module, loader(table()))
    assert "exchanges" not in vars(trainer.fit_loop._data_source)
    module.fail = False
    trainer.fit(module, loader(table()))
    assert sorted(module.seen[-1]) == GOOD


def test_a_probe_that_fails_leaves_the_trainer_as_it_was():
    class Fails(Net):
        def on_train_start(self):
            raise RuntimeError("stop here")

    module, callback = Fails(), DataFilter([AUM()], probe=BRIEF)
    trainer = make_trainer(pl.Trainer, callback, limit_val_batches=0, max_epochs=1)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(module, loader(table()))
    assert "_restore_modules_and_callbacks" not in vars(trainer._checkpoint_connector)
    with pytest.raises(RuntimeError, match="decided nothing yet"):
        _ = callback.kept


def test_rows_that_differ_in_every_call_of_the_loader_are_refused():
    class Splits(Net):
        def train_dataloader(self):
            return loader(torch.utils.data.random_split(table(), [200, 40])[0])

        def on_fit_start(self):
            torch.rand(3)

    seed_all(0)
    with pytest.raises(ValueError, match=r"train_dataloader\(\) must give the same rows in every call"):
        make_trainer(pl.Trainer, marking(), limit_val_batches=0).fit(Splits())


# --- resuming, masks, quarantines ----------------------------------------------------------------------------------


def test_a_run_that_resumes_uses_the_same_mask_without_a_probe(probes):
    data, _ = flipped(table())
    callback = DataFilter([AUM()], probe=BRIEF)
    saving, settings = checkpointed()
    run(callback, data, *saving, **settings)
    count = len(probes)
    content = torch.load("first/last.ckpt", weights_only=True)
    state = content["callbacks"]["DataFilter"]
    assert json.loads(json.dumps(state)) == state
    again, module = DataFilter([AUM()], probe=BRIEF), Net()
    trainer = make_trainer(pl.Trainer, again, limit_val_batches=0, default_root_dir="second")
    trainer.fit(module, loader(data), ckpt_path="first/last.ckpt", weights_only=True)
    assert len(probes) == count > 0
    assert (again.kept == callback.kept).all()
    assert not again.kept.all()
    assert set(module.seen[-1]) == set(np.flatnonzero(callback.kept))
    assert Path("second/filter_mask.json").read_text() == Path("first/filter_mask.json").read_text()
    other = make_trainer(pl.Trainer, DataFilter([AUM()]), limit_val_batches=0)
    with pytest.raises(ValueError, match="mask was made for 240 rows with root"):
        other.fit(Net(), loader(table(seed=3)), ckpt_path="first/last.ckpt", weights_only=True)


def test_a_checkpoint_that_was_made_without_it_is_told_so(probes):
    saving, settings = checkpointed()
    run(None, None, *saving, **settings)
    trainer = make_trainer(pl.Trainer, DataFilter([AUM()], probe=BRIEF), limit_val_batches=0)
    with pytest.warns(UserWarning, match="checkpoint was trained without it"):
        trainer.fit(Net(), loader(table()), ckpt_path="first/last.ckpt", weights_only=True)
    assert probes


def test_a_mask_file_is_used_without_a_probe(probes):
    run(marking(), default_root_dir="first")
    for path in ("first", "first/filter_mask.json"):
        module, _ = run(callback := DataFilter(mask=path), default_root_dir="deep/second")
        assert sorted(module.seen[0]) == GOOD
        assert np.flatnonzero(~callback.kept).tolist() == list(BAD)
    assert not probes[1:]
    assert Path("deep/second/filter_mask.json").exists()
    with pytest.raises(ValueError, match="made for 240 rows"):
        run(DataFilter(mask="first"), table(100))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2 is not known"),
        ({"keep": "!"}, "no mask"),
        ({"keep": "AAAA"}, "3 bytes do not hold 240"),
        ({"rows": True}, "rows or root"),
        ({"action": "burn"}, "action 'burn' is not known"),
        ({"weight": 3.0}, r"weight 3.0 is not in \(0, 1\]"),
        ({"weight": float("inf")}, "Infinity is not JSON"),
    ],
)
def test_a_mask_file_is_read_with_suspicion(change, said):
    state = Mask(np.ones(240, dtype=bool), "0" * 64, "drop").to_dict() | change
    Path("mask.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"^data_filter.mask: mask.json: .*{said}"):
        Mask.read("mask.json")


@pytest.mark.parametrize("weights", [None, np.where(np.arange(21) % 2 == 0, 0.1, 1.0), np.full(21, 0.1)])
def test_a_mask_survives_its_file(weights, tmp_path):
    mask = Mask(np.arange(21) % 3 > 0, "ab" * 32, "downweight", weights)
    mask.write(tmp_path / Mask.FILE)
    found = Mask.read(tmp_path)
    assert (found.keep == mask.keep).all()
    assert (found.root, found.action) == (mask.root, mask.action)
    assert weights is None or len(set(weights)) == 1 or (found.weights == weights).all()


def test_rows_that_were_restored_are_kept_and_stay_on_record():
    run(marking(), default_root_dir="first")
    Quarantine.read("first").restore([4, 77], reason="looked at", who="me").write("checked.json")
    module, _ = run(marking(quarantine="checked.json"), default_root_dir="second")
    assert set(range(N)) - set(module.seen[0]) == set(BAD) - {4, 77}
    found = {entry.index: entry for entry in Quarantine.read("second").entries}
    assert found.keys() == set(BAD)
    assert {i for i, entry in found.items() if entry.status == "restored"} == {4, 77}
    assert found[4].history[0].reason == "looked at"
    x, y, row = table().tensors
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    moved = TensorDataset(x[order], y[order], row[order])
    where = [order.tolist().index(row) for row in BAD]
    module, _ = run(marking(where, quarantine="checked.json"), moved)
    assert set(range(N)) - set(module.seen[0]) == set(BAD) - {4, 77}


def test_a_quarantine_that_says_nothing_of_these_rows_is_told(caplog):
    run(marking(), default_root_dir="first")
    with caplog.at_level("INFO"):
        run(marking(quarantine="first"))
    assert "nothing was restored in the quarantine first: it keeps no row" in caplog.text
    Quarantine.read("first").restore([4, 77]).write("checked.json")
    with pytest.warns(UserWarning, match="none of the 2 rows .* restored in the quarantine checked.json is in the tr"):
        run(marking(quarantine="checked.json"), table(seed=3))
    with pytest.raises(ValueError, match=r"^data_filter.quarantine: none.json: there is no such file"):
        run(marking(quarantine="none.json"))


# --- what a run leaves behind --------------------------------------------------------------------------------------


class Images(TupleBatch):
    def __init__(self) -> None:
        super().__init__()
        self.labels = []

    def training_step(self, batch, batch_idx):
        self.labels += batch[1].tolist()
        return super().training_step(batch, batch_idx)


def test_the_files_agree_with_one_another_and_with_the_mask():
    x, y = image_columns(60)
    bad = torch.arange(0, 60, 7)
    callback = marking(bad.tolist())
    run(callback, image_loader(x, y, shuffle=True), module=Images())
    decisions, found, quarantine = read_decisions("filter_decisions.csv"), report(), Quarantine.read(".")
    assert (decisions.kept == callback.kept).all()
    assert len(list(csv.reader(Path("filter_decisions.csv").read_text().splitlines()))) == 61
    assert decisions.labels.tolist() == y.tolist()
    assert [e.index for e in quarantine.entries] == bad.tolist()
    assert quarantine.root == found["data"]["root"] == Mask.read(".").root
    assert quarantine.entries[0].sha256 == decisions.digests[0]
    assert found["outcome"] == "9 of 60 rows (15.00 %) are quarantined."
    assert found["kept"] == 51
    assert found["decisions"]["quarantine"] == 9
    assert found["classes"][1]["rows"] == 20
    assert found["settings"]["policy"]["action"] == "quarantine"
    pictures = np.load("filter_suspicious.npy", allow_pickle=False)
    assert pictures.shape == (9, 1, 8, 8)
    assert pictures.dtype == np.uint8
    assert sorted(found["pictures"]["rows"]) == bad.tolist()
    shown = x[found["pictures"]["rows"]]
    shown = (shown - shown.min()) / (shown.max() - shown.min()) * 255
    assert np.abs(pictures - shown.numpy()).max() <= 0.5 + 1e-3


def test_rows_that_are_weighted_down_are_drawn_less_often():
    bad = range(0, N, 4)
    callback = marking(bad, policy=Policy("downweight", weight=0.1, max_drop=0.5, max_drop_per_class=0.5))
    module, _ = run(callback, max_epochs=10)
    assert callback.kept.all()
    drawn = np.bincount(np.concatenate(module.seen), minlength=N)
    light = np.isin(np.arange(N), list(bad))
    assert len(module.seen[0]) == N
    assert 0.05 < drawn[light].mean() / drawn[~light].mean() < 0.2
    decisions = read_decisions("filter_decisions.csv")
    assert set(decisions.decision[light]) == {"downweight"}
    assert set(decisions.weights[light]) == {0.1}
    assert not Path("quarantine.json").exists()
    assert report()["outcome"].startswith("60 of 240 rows (25.00 %) are drawn less often")


def test_where_nothing_is_flagged_weights_change_nothing():
    policy = Policy("downweight")
    assert_same(trace_of(Net), trace_of(Net, marking((), policy=policy)))


def test_rows_can_be_weighted_only_where_the_loader_draws_each_once():
    data = loader(table(), shuffle=False, sampler=RandomSampler(range(N), replacement=True))
    with pytest.raises(ValueError, match="can be weighted only where the train loader draws each of them once"):
        run(DataFilter([AUM()], Policy("downweight")), data)


def test_what_exceeds_the_caps_is_kept_and_said():
    with pytest.warns(UserWarning, match="flagged, and no more than 72 may be touched .*your consent"):
        module, _ = run(marking(range(0, N, 2), policy=Policy(max_drop_per_class=1.0)))
    assert len(module.seen[0]) == N - 72
    assert report()["capped"] == 120 - 72


def test_a_fast_dev_run_writes_nothing_and_leaves_nothing_out(probes):
    data, _ = flipped(table())
    callback = DataFilter({"aum": AUM(), "marked": Marked((*range(64), *BAD)), "groups": IsolatedGroups()})
    module = Net()
    trainer = make_trainer(pl.Trainer, callback, fast_dev_run=True)
    trainer.fit(module, loader(data))
    assert probes
    assert callback.kept.all()
    assert not list(Path().iterdir())
    callback.filters = {"marked": Marked(BAD)}
    run(callback, data)  # the mask of the fast run does not count
    assert not callback.kept.all()


@pytest.mark.parametrize("trusted", ["val", "rows", "dataset"])
def test_a_fast_dev_run_goes_through_all_with_trusted_rows(trusted, probes):
    given = {"val": "val", "rows": range(100, 140), "dataset": table(40, seed=5)}[trusted]
    callback = DataFilter(trusted=given, policy=Policy("drop"))
    trainer = make_trainer(pl.Trainer, callback, fast_dev_run=True)
    trainer.fit(Net(), datamodule=Data(table()))
    assert len(probes) > 2
    assert callback.kept.all()
