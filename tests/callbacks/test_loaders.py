"""Train loaders without some of their rows, and a record of which rows each batch has."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import random
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from loader_kinds import (
    DROPPED,
    KEEP,
    KINDS,
    ODD,
    STREAMS,
    Bypassing,
    Endless,
    EpochOrder,
    Items,
    N,
    OwnOrder,
    OwnShard,
    Sample,
    Stream,
    Unaware,
    rows_of,
    tensors,
)
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import (
    ChainDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from robust_train.callbacks import _loaders, _seams
from robust_train.callbacks._loaders import (
    KeptRows,
    as_list,
    filtered,
    filtered_iterable,
    is_plain,
    map_loaders,
    rebuilt,
)
from robust_train.callbacks._recorder import Recorder
from robust_train.callbacks._samplers import KeptShard, spread

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
ALL = np.ones(N, dtype=bool)


def passed(loader: Any) -> list[int]:
    """Rows of a pass."""
    return [row for batch in loader for row in rows_of(batch)]


def tidy(loader: Any) -> None:
    """Workers that wait for another pass are stopped; those that are forked later would wait for them."""
    if getattr(loader, "persistent_workers", False):
        loader._iterator = None
        gc.collect()


# --- a training run


class Net(pl.LightningModule):
    """Notes the rows of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.validated = 0

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any) -> torch.Tensor:
        self.seen[-1].append(rows_of(batch))
        return self.weight.sum()

    def validation_step(self, batch: Any) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.validated += 1

    def val_dataloader(self) -> Any:
        return DataLoader(torch.zeros(2, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Filtering(pl.Callback):
    """Filters every loader, and records it; ``prepared``: after Lightning has exchanged its sampler."""

    def __init__(self, exchange: Any, prepared: bool = False) -> None:
        self.exchange, self.prepared = exchange, prepared
        self.recorders: dict[Any, Recorder] = {}
        self.recorded: list[list[int]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.undo = [_seams.exchange_train_loader(trainer, lambda loaders: map_loaders(self._one, loaders))]
        if self.prepared:
            self.undo.append(
                _seams.exchange_prepared_loader(trainer, lambda loader: self._recorded(loader, len(self.recorders)))
            )

    def _one(self, loader: Any, path: Any) -> Any:
        loader = self.exchange(loader)
        return self._recorded(loader, path) if not self.prepared else loader

    def _recorded(self, loader: Any, path: Any) -> Any:
        if isinstance(loader.dataset, IterableDataset):
            return loader
        return self.recorders.setdefault(path, Recorder()).attach(loader)

    def on_train_batch_end(self, *args: Any) -> None:
        self.recorded.append(sum((recorder.pop().tolist() for recorder in self.recorders.values()), []))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for undo in self.undo:
            undo()


def trainer_with(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | off | settings
    return pl.Trainer(callbacks=list(callbacks), **settings)


def fit(
    make: Any, source: str, exchange: Any, prepared: bool = False, **settings: Any
) -> tuple[Net, Filtering, pl.Trainer, Any]:
    """A run whose train loader comes from ``source``; also what the user made."""
    made: list[Any] = []

    def train_dataloader(self: Any = None) -> Any:
        made.append(make())
        return made[-1]

    module = type("Own", (Net,), {"train_dataloader": train_dataloader})() if source == "module" else Net()
    data: dict[str, Any] = {}
    if source == "datamodule":
        data["datamodule"] = type(
            "Data",
            (pl.LightningDataModule,),
            {"train_dataloader": train_dataloader, "val_dataloader": Net.val_dataloader},
        )()
    if source == "raw":
        data["train_dataloaders"] = train_dataloader()
        data["val_dataloaders"] = module.val_dataloader()
    callback = Filtering(exchange, prepared)
    trainer = trainer_with(callback, **settings)
    trainer.fit(module, **data)
    return module, callback, trainer, made[0]


def state_of(loader: Any) -> list[dict[str, Any]]:
    """Attributes of a loader and its samplers; those in which a sampler counts its own passes aside."""
    objects = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    return [{k: v for k, v in getattr(o, "__dict__", {}).items() if k not in ("epoch", "told")} for o in objects]


def same_objects(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return all(x.keys() == y.keys() and all(x[k] is y[k] for k in x) for x, y in zip(a, b, strict=True))


SOURCES = ("raw", "module", "datamodule")


def places(kinds: Any) -> list[Any]:
    """Each kind from one source, and with ``-m slow`` from all."""
    return [
        pytest.param(kind, source, marks=[] if i % 3 == j else pytest.mark.slow)
        for i, kind in enumerate(kinds)
        for j, source in enumerate(SOURCES)
    ]


@pytest.mark.parametrize(("kind", "source"), places(KINDS))
def test_dropped_rows_are_not_seen_and_kept_ones_are(kind, source):
    spec = KINDS[kind]
    seen_by_callback: list[tuple[Any, Any]] = []

    def exchange(loader: Any) -> Any:
        seen_by_callback.append((loader, state_of(loader)))
        return filtered(loader, KEEP)

    module, callback, trainer, made = fit(spec.make, source, exchange)
    assert len(module.seen) == 2
    for epoch in module.seen:
        rows = sum(epoch, [])
        assert rows
        assert not set(rows) & set(DROPPED)
        if spec.rows is not None:
            assert sorted(rows) == sorted(spec.rows - set(DROPPED))
        if kind != "unsized_sampler":
            assert len(epoch) == trainer.num_training_batches
        if spec.batches is not None:
            assert len(epoch) == spec.batches
    assert module.validated == 2
    assert callback.recorded == [batch for epoch in module.seen for batch in epoch]
    for loader, before in seen_by_callback:
        assert same_objects(before, state_of(loader))
    if spec.rows is not None:
        assert sorted(passed(made)) == sorted(spec.rows)
    tidy(made)


@pytest.mark.parametrize(("kind", "source"), places(STREAMS))
def test_examples_of_a_stream_are_kept_by_a_predicate(kind, source):
    module, *_, made = fit(
        STREAMS[kind], source, lambda loader: filtered_iterable(loader, lambda sample: KEEP[int(sample[1])])
    )
    for epoch in module.seen:
        assert sorted(sum(epoch, [])) == np.flatnonzero(KEEP).tolist()
    assert module.validated == 2
    assert sorted(passed(made)) == list(range(N))
    tidy(made)


# --- without a run


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_row_kept_it_is_the_same_loader(kind):
    before = torch.get_rng_state()
    for _, loader in as_list(KINDS[kind].make()):
        assert filtered(loader, ALL) is loader
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_filtering_draws_no_random_numbers(kind):
    global_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loaders = [loader for _, loader in as_list(KINDS[kind].make())]
    states = [loader.generator.get_state() for loader in loaders if loader.generator is not None]
    for loader in loaders:
        filtered(loader, KEEP)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert np.random.get_state()[1].tolist() == numpy_state
    for loader, state in zip([x for x in loaders if x.generator is not None], states, strict=True):
        assert torch.equal(loader.generator.get_state(), state)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if isinstance(KINDS[kind].make(), DataLoader)])
def test_recording_changes_no_batch(kind):
    def passes(loader: Any, recorder: Recorder | None = None) -> list[list[int]]:
        found = []
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        for _ in range(2):
            for batch in loader:
                found.append(rows_of(batch))
                if recorder:
                    assert recorder.pop().tolist() == found[-1]
        return found

    recorder = Recorder()
    assert passes(recorder.attach(KINDS[kind].make()), recorder) == passes(KINDS[kind].make())


@pytest.mark.parametrize("kind", ["shuffled", "workers", "persistent_workers", "bucketed", "unbatched_tensors"])
def test_settings_of_the_loader_stay(kind):
    loader = KINDS[kind].make()
    other = filtered(loader, KEEP)
    assert type(other) is type(loader)
    differ = {name for name in vars(loader) if vars(loader)[name] is not vars(other)[name]}
    notes = {"__dataset", "__pl_saved_args", "__pl_saved_kwargs"}  # Lightning's, where it watches loaders being made
    assert differ <= {"dataset", "sampler", "batch_sampler"} | notes


def test_workers_of_the_users_loader_are_not_shared():
    loader = KINDS["persistent_workers"].make()
    next(iter(loader))
    other = filtered(loader, KEEP)
    assert other._iterator is None
    assert sorted(passed(other)) == np.flatnonzero(KEEP).tolist()
    assert sorted(passed(loader)) == list(range(N))


def test_types_that_other_code_asks_for_stay_torchs():
    """Poisson sampling, ``DistributedSampler`` and ``overfit_batches`` go by them."""
    plain = filtered(KINDS["shuffled"].make(), KEEP)
    assert is_plain(plain)
    assert type(plain.sampler) is RandomSampler
    assert plain.sampler.generator is None
    generator = KINDS["generator"].make()
    assert filtered(generator, KEEP).sampler.generator is generator.sampler.generator
    assert type(filtered(KINDS["sequential"].make(), KEEP).sampler) is SequentialSampler
    for kind in ("own_sampler", "random_subclass", "half", "list_sampler", "subset_random", "weighted"):
        assert not isinstance(filtered(KINDS[kind].make(), KEEP).sampler, (RandomSampler, SequentialSampler))


def test_a_users_distributed_sampler_keeps_its_settings():
    user = DistributedSampler(range(N), 3, 1, shuffle=True, seed=7, drop_last=True)
    user.set_epoch(4)
    loaders = [
        filtered(DataLoader(tensors(), 4, sampler=DistributedSampler(range(N), 3, rank, seed=7, drop_last=True)), KEEP)
        for rank in range(3)
    ]
    rows = [passed(loader) for loader in loaders]
    assert [len(r) for r in rows] == [5, 5, 5]  # 16 kept rows
    assert len(set(sum(rows, []))) == 15
    made = filtered(DataLoader(tensors(), 4, sampler=user), KEEP).sampler
    assert type(made) is DistributedSampler
    settings = ("num_replicas", "rank", "shuffle", "seed", "drop_last", "epoch")
    assert [getattr(made, name) for name in settings] == [getattr(user, name) for name in settings]
    assert len(user.dataset) == N


def test_a_subclass_of_the_distributed_sampler_is_not_shared_out_again():
    shares = [filtered(DataLoader(tensors(), 4, sampler=OwnShard(range(N), 2, rank)), KEEP) for rank in (0, 1)]
    assert all(
        isinstance(share.sampler, KeptShard) and isinstance(share.sampler, DistributedSampler) for share in shares
    )
    assert (
        len(shares[0]) == len(shares[1]) == len(list(shares[0])) == len(list(shares[1]))
    )  # or the processes would hang
    seen = [set(passed(share)) for share in shares]
    assert seen[0] | seen[1] == set(np.flatnonzero(KEEP).tolist())
    assert not seen[0] & seen[1]
    before = passed(shares[0])
    shares[0].sampler.set_epoch(1)
    assert passed(shares[0]) != before


def test_the_epoch_reaches_the_users_sampler():
    user = EpochOrder()
    module, *_ = fit(lambda: DataLoader(tensors(), 4, sampler=user), "raw", lambda loader: filtered(loader, KEEP))
    assert set(user.told) == {0, 1}
    assert module.seen[0] != module.seen[1]
    expected = [row for row in np.random.default_rng(1).permutation(N).tolist() if KEEP[row]]
    assert sum(module.seen[1], []) == expected


def test_what_a_sampler_does_after_its_last_row_is_done():
    user = OwnOrder()
    for _ in range(2):
        list(filtered(DataLoader(tensors(), batch_size=5, sampler=user), KEEP))
    assert user.epoch == 2


def test_a_weighted_sampler_keeps_the_expected_draws_of_each_row():
    weights = [3.0 if i in DROPPED else 1.0 for i in range(N)]  # half of all draws
    loader = filtered(DataLoader(tensors(), sampler=WeightedRandomSampler(weights, 400 * N)), KEEP)
    assert len(loader) == 400 * N // (3 * len(DROPPED) + 16) * 16
    unlikely = [0.0 if KEEP[i] else 1.0 for i in range(N)]
    with pytest.raises(ValueError, match="gives weight 0 to every row that is kept"):
        filtered(DataLoader(tensors(), sampler=WeightedRandomSampler(unlikely, N)), KEEP)


def test_weights_set_how_often_kept_rows_are_drawn():
    weights = np.where(np.arange(N) < 12, 1.0, 0.25)
    weights[~KEEP] = np.nan  # of no interest
    torch.manual_seed(0)
    loader = filtered(DataLoader(tensors(), 4, shuffle=True), KEEP, weights)
    assert len(loader) == 4
    assert type(loader.sampler) is WeightedRandomSampler
    counts = np.bincount(sum((passed(loader) for _ in range(300)), []), minlength=N)
    assert not counts[~KEEP].any()
    expected = np.where(KEEP, weights, 0) / weights[KEEP].sum() * 300 * 16
    assert (abs(counts - expected) <= 5 * np.sqrt(expected)).all()
    assert len(passed(filtered(DataLoader(tensors(), 4), ALL, np.ones(N)))) == N


@pytest.mark.parametrize(
    ("kind", "weights", "says"),
    [
        ("shuffled", np.ones(N - 1), r"one for each row of the dataset, got shape \(23,\)"),
        ("shuffled", np.zeros(N), "finite and > 0 for kept rows"),
        ("shuffled", np.full(N, np.inf), "finite and > 0 for kept rows"),
        ("weighted", np.ones(N), "only where the train loader draws each of them once.*WeightedRandomSampler"),
        ("bucketed", np.ones(N), "Bucketed"),
        ("unbatched", np.ones(N), "NoneType"),
    ],
)
def test_weights_that_cannot_be_are_refused(kind, weights, says):
    with pytest.raises(ValueError, match=says):
        filtered(KINDS[kind].make(), KEEP, weights)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize(
    "kind", [k for k in KINDS if KINDS[k].rows is not None and "worker" not in k and k != "doubling_subclass"]
)
def test_lengths_are_exact_whatever_is_dropped(kind, share):
    for seed in range(4):
        keep = np.random.default_rng(seed).random(N) < share
        keep[[1, 3, 8, 16]] = True  # something is left of every sampler's rows
        loader = filtered(KINDS[kind].make(), keep)
        if kind != "generator":  # drop_last
            expected = sorted(row for row in KINDS[kind].rows if keep[row])
            seen = passed(loader)
            assert set(seen) == set(expected)
            if kind not in ("shuffled_batches", "unbatched_tensors", "bucketed", "unbatched_bucketed"):
                assert sorted(seen) == expected
        if kind != "unsized_sampler":
            assert len(loader) == len(list(loader)) == len(list(loader))


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=9), min_size=1, max_size=9), st.integers(0, 40))
def test_spread_splits_batches_and_never_mixes_them(batches, more):
    count = len(batches) + more
    found = spread(batches, count)
    assert len(found) == count
    assert all(found)
    rows = sum(map(len, batches))
    flat, owner = sum(batches, []), [i for i, batch in enumerate(batches) for _ in batch]
    assert sum(map(list, found[: min(count, rows)]), []) == flat
    at = 0
    for batch in found[: min(count, rows)]:
        assert len({owner[i] for i in range(at, at + len(batch))}) == 1
        at += len(batch)


def test_one_pass_says_when_nothing_is_left():
    """Rows that a sampler draws anew in each pass may all be dropped ones."""
    keep = np.arange(N) == 0
    loader = None
    while loader is None:  # a first pass without row 0 is refused at once
        random.random()
        try:
            loader = filtered(DataLoader(tensors(), sampler=Unaware()), keep)
        except ValueError:
            continue
    with pytest.raises(RuntimeError, match="every row that the train loader's Unaware draws was dropped"):
        [list(loader) for _ in range(200)]


# --- what the view of the kept rows is like


def test_attributes_of_the_dataset_are_read_and_written_through_the_view():
    dataset = Items(Sample)
    view = filtered(DataLoader(dataset, 4), KEEP).dataset
    assert view.classes == ("a", "b")
    view.sample = lambda x, row: row
    assert dataset[3] == 3
    with pytest.raises(AttributeError, match="missing"):
        _ = view.missing
    assert len(view) == 16
    other = pickle.loads(pickle.dumps(filtered(DataLoader(tensors(), 4), KEEP).dataset))  # noqa: S301
    assert other[3][1] == np.flatnonzero(KEEP)[3]
    assert copy.deepcopy(view).classes == ("a", "b")


@pytest.mark.parametrize("index", [2, [2, 0], np.array([2, 0]), torch.tensor([2, 0]), torch.tensor(2), slice(0, 3)])
def test_the_view_takes_every_index_that_the_dataset_takes(index):
    rows = np.flatnonzero(KEEP)
    found = KeptRows(tensors(), rows)[index][1]
    assert torch.equal(found, torch.from_numpy(rows)[index])


def test_a_filtered_loader_can_be_filtered_again():
    once = filtered(DataLoader(tensors(), 4, shuffle=True), KEEP)
    recorder = Recorder()
    loader = recorder.attach(filtered(once, np.arange(16) < 8))
    for batch in loader:
        assert recorder.pop().tolist() == rows_of(batch)
    assert sorted(passed(loader)) == np.flatnonzero(KEEP)[:8].tolist()


# --- refusals


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ([1, 2], "torch DataLoader, got list"),
        (DataLoader(Stream(), 4), "Stream is an iterable dataset: give DataFilter a predicate="),
        (DataLoader(ChainDataset([Stream()]), 4), "ChainDataset is an iterable dataset"),
        (DataLoader({"a": 1, "b": 2}, sampler=["a", "b"]), "yields 'a', which is no row number below 2"),
        (DataLoader(tensors(), batch_sampler=[[(0, 3)], [(1, 2)]]), r"yields \(0, 3\), which is no row number"),
        (DataLoader(tensors(), sampler=[0, N]), "yields 24, which is no row number below 24"),
        (DataLoader(tensors(), sampler=[]), "list yields nothing"),
        (
            DataLoader(tensors(), sampler=list(DROPPED)),
            "every row that the train loader's sampler list draws was dropped",
        ),
        (DataLoader(tensors(), sampler=SubsetRandomSampler(DROPPED)), "SubsetRandomSampler draws was dropped"),
        (DataLoader(tensors(), 20, drop_last=True), "only 16 of 24 rows are kept, fewer than make up a batch of 20"),
        (Bypassing(tensors(), 4), "Bypassing overrides DataLoader.__iter__ and does not read"),
        (Endless(tensors(), 4), "Endless keeps an iterator of its own.*'iterator'"),
    ],
)
def test_what_cannot_be_filtered_is_refused(loader, says):
    keep = KEEP if not isinstance(getattr(loader, "dataset", None), dict) else np.array([True, False])
    with pytest.raises(ValueError, match=says):
        filtered(loader, keep)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (np.ones(N - 1, dtype=bool), r"shape \(24,\).*got bool \(23,\)"),
        (np.arange(N), "must be bool"),
        (np.zeros(N, dtype=bool), "no row of the training dataset is kept"),
    ],
)
def test_a_wrong_mask_is_refused(keep, says):
    with pytest.raises(ValueError, match=says):
        filtered(DataLoader(tensors(), 4), keep)


def test_a_dataset_without_a_length_is_refused():
    class Lengthless:
        def __getitem__(self, row: int) -> int:
            return row

    with pytest.raises(ValueError, match="Lengthless has no length: define __len__"):
        filtered(DataLoader(Lengthless(), sampler=range(3)), KEEP)


def test_a_predicate_is_for_iterable_datasets_alone():
    for wrong in (DataLoader(tensors(), 4), [1]):
        with pytest.raises(ValueError, match="the train loader has (TensorDataset|list)"):
            filtered_iterable(wrong, bool)
    with pytest.raises(ValueError, match=r"filter with datapipe\.filter"):
        filtered_iterable(DataLoader(IterableWrapper(range(4))), bool)


def test_a_predicate_that_drops_all_that_one_of_several_workers_reads_is_warned_of(monkeypatch):
    view = filtered_iterable(DataLoader(Stream(), 4), lambda sample: False).dataset
    with pytest.raises(ValueError, match=r"^DataFilter's predicate <lambda> dropped every one of the \d+ examples"):
        list(view)
    monkeypatch.setattr(_loaders, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    with pytest.warns(UserWarning, match="examples of Stream that worker 1 reads"):
        assert list(view) == []


def test_a_stream_that_is_empty_is_not_the_predicates_fault():
    class Empty(Stream):
        def __iter__(self):
            return iter(())

    assert list(filtered_iterable(DataLoader(Empty(), 4), lambda sample: False).dataset) == []


def test_a_filtered_stream_has_no_length():
    class Sized(Stream):
        def __len__(self) -> int:
            return N

    loader = filtered_iterable(DataLoader(Sized(), 4), lambda sample: True)
    with pytest.raises(TypeError, match="len"):
        len(loader)


# --- other datasets


class Marked(TensorDataset):
    """Another dataset: rows are told apart by an offset."""

    def __init__(self, count: int = N) -> None:
        super().__init__(torch.zeros(count, 2), 100 + torch.arange(count))


@pytest.mark.parametrize("kind", [k for k in KINDS if isinstance(KINDS[k].make(), DataLoader) and "getitems" not in k])
def test_the_same_loader_for_another_dataset(kind):
    loader, spec = KINDS[kind].make(), KINDS[kind]
    before = state_of(loader)
    drawn = passed(rebuilt(loader, _like(loader)))
    assert {row - 100 for row in drawn} <= set(range(N))
    if spec.rows is not None:
        assert sorted(row - 100 for row in drawn) == sorted(spec.rows)
    in_order = rebuilt(loader, _like(loader, 30), shuffle=False)
    batches = [rows_of(batch) for batch in in_order]
    assert sum(batches, []) == list(range(100, 130))
    assert len(in_order) == len(batches)
    assert type(in_order) is type(loader)
    if loader.batch_size is not None:
        assert len(batches[0]) == loader.batch_size
    shuffled = passed(rebuilt(loader, _like(loader, 30), shuffle=True))
    assert sorted(shuffled) == list(range(100, 130)) != shuffled
    assert same_objects(before, state_of(loader))


def _like(loader: Any, count: int = N) -> Any:
    """A dataset whose samples the loader's collate function takes."""
    if "Columns" in type(loader.dataset).__name__:
        return _Dicts(count)
    return Marked(count)


class _Dicts(Marked):
    def __getitem__(self, index: Any) -> Any:
        x, row = super().__getitem__(index)
        return {"x": x, "row": row}


def test_a_sampler_for_other_rows_is_refused():
    with pytest.raises(ValueError, match="made for 24 rows, and there are 30: say shuffle="):
        rebuilt(DataLoader(tensors(), sampler=ODD), Marked(30))
    assert len(rebuilt(DataLoader(tensors(), 4, shuffle=True, drop_last=True), Marked(30))) == 7


# --- structures


def test_structures_are_kept_and_places_are_told():
    a, b, c = (DataLoader(tensors(), 4) for _ in range(3))
    pair = Sample(b, c)  # a named tuple
    combined = CombinedLoader([a, {"x": b}], "min_size")
    mixed = {"a": a, "pair": pair, "list": [b, (c,)], "both": combined}
    found = map_loaders(lambda loader, path: (path, loader), mixed)
    assert found["a"] == (("a",), a)
    assert isinstance(found["pair"], Sample)
    assert found["list"] == [(("list", 0), b), ((("list", 1, 0), c),)]
    assert found["both"] is not combined
    assert found["both"].iterables == [(("both", 0), a), {"x": (("both", 1, "x"), b)}]
    assert combined.iterables == [a, {"x": b}]
    assert [path for path, _ in as_list(mixed)] == [
        ("a",), ("pair", 0), ("pair", 1), ("list", 0), ("list", 1, 0), ("both", 0), ("both", 1, "x")
    ]  # fmt: skip
    assert as_list(a) == [((), a)]
    factory = defaultdict(list, {"a": a})
    assert map_loaders(lambda loader, path: 1, factory) == {"a": 1}
    assert map_loaders(lambda loader, path: 1, factory).default_factory is list
    assert isinstance(map_loaders(lambda loader, path: 1, OrderedDict(a=a)), OrderedDict)
    assert factory == {"a": a}


# --- the recorder


def test_a_pass_that_is_broken_off_leaves_nothing_behind():
    recorder = Recorder()
    for kind in ("shuffled", "workers", "persistent_workers"):
        loader = recorder.attach(KINDS[kind].make())
        for _ in range(3):
            for i, batch in enumerate(loader):
                assert recorder.pop().tolist() == rows_of(batch)
                if i == 1:
                    break
    with pytest.raises(RuntimeError, match="delivered no batch"):
        Recorder().pop()


@pytest.mark.parametrize("limit", [2, 1.0])
@pytest.mark.parametrize("kind", ["shuffled", "workers", "persistent_workers", "unsized_sampler", "list_of_loaders"])
def test_records_fit_the_steps_in_limited_epochs(kind, limit):
    module, callback, *_ = fit(
        KINDS[kind].make, "raw", lambda loader: filtered(loader, KEEP), limit_train_batches=limit, max_epochs=3
    )
    assert callback.recorded == [batch for epoch in module.seen for batch in epoch]


def test_batches_in_another_order_than_drawn_are_refused():
    with pytest.raises(ValueError, match="in_order=False"):
        Recorder().attach(DataLoader(tensors(), 4, num_workers=2, in_order=False))
    with pytest.raises(ValueError, match="iterable dataset"):
        Recorder().attach(DataLoader(Stream(), 4))


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_a_class_that_makes_its_dataset_itself_is_not_made_anew():
    with pytest.raises(ValueError, match="OwnData makes its dataset itself, which brings the dropped rows back"):
        fit(KINDS["own_data_subclass"].make, "module", lambda loader: filtered(loader, KEEP), True, overfit_batches=2)


def test_both_lightning_packages_combine_loaders():
    from lightning.pytorch.utilities.combined_loader import CombinedLoader as Other

    loader = DataLoader(tensors(), 4)
    found = map_loaders(lambda loader, path: filtered(loader, KEEP), Other({"a": loader}, "min_size"))
    assert type(found) is Other
    assert len(found.flattened[0].dataset) == 16


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "kind", ["shuffled", "weighted", "own_sampler", "subset_random", "collating_subclass", "bucketed"]
)
def test_overfitting_a_few_batches_brings_no_dropped_row_back(kind, source):
    module, callback, *_ = fit(
        KINDS[kind].make, source, lambda loader: filtered(loader, KEEP), prepared=True, overfit_batches=2
    )
    assert not set(sum(sum(module.seen, []), [])) & set(DROPPED)
    assert callback.recorded == [batch for epoch in module.seen for batch in epoch]


# --- several processes


def in_two_processes(path: Path, cases: list[tuple[str, str, bool]]) -> list[tuple[Any, Any]]:
    """Of each case ``(kind, source, whether Lightning shares the rows out)`` what the two ranks found."""
    command = [sys.executable, str(Path(__file__).with_name("loaders_ddp_script.py")), str(path / "out")]
    done = subprocess.run([*command, json.dumps(cases)], cwd=path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((path / f"out.{rank}").read_text()) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))


SHARED = ("shuffled", "sequential", "workers", "own_sampler", "own_sampler_with_epochs", "subset_random", "half",
          "weighted_once", "bucketed", "collating_subclass", "doubling_subclass", "dict_of_loaders")  # fmt: skip
UNSHARED = ("users_distributed", "ranked", "distributed_subclass", "shuffled_batches", "grouped")
REFUSED = {"grouped": r"TypeError.*Trainer\(use_distributed_sampler=False\)", "own_data_subclass": "makes its dataset"}


@pytest.mark.ddp
@pytest.mark.parametrize("source", ["raw", "module"])
def test_two_processes_share_the_kept_rows(source, tmp_path):
    cases = [(kind, source, True) for kind in (*SHARED, "users_distributed", "weighted", "replacement")]
    cases += [(kind, source, False) for kind in UNSHARED]
    for (kind, _, shared), ranks in zip(cases, in_two_processes(tmp_path, cases), strict=True):
        for rank in ranks:
            assert "error" not in rank, (kind, rank)
            assert rank["recorded"]
            assert rank["validated"] == len(rank["epochs"]) == 2
            assert {len(epoch) for epoch in rank["epochs"]} == {rank["batches"]} == {ranks[0]["batches"]}
        for epochs in zip(*(rank["epochs"] for rank in ranks), strict=True):
            rows = [set(sum(epoch, [])) for epoch in epochs]
            assert not (rows[0] | rows[1]) & set(DROPPED)
            if kind in ("weighted", "replacement"):
                continue
            possible = KINDS[kind].rows if kind in KINDS and KINDS[kind].rows is not None else range(N)
            assert rows[0] | rows[1] == set(possible) - set(DROPPED), kind
            if kind not in ("subset_random", "half", "ranked") and (shared or kind == "users_distributed"):
                assert not rows[0] & rows[1], kind  # the former have an odd number of rows, or repeat some


@pytest.mark.ddp
def test_what_two_processes_cannot_share_is_refused(tmp_path):
    cases = [(kind, "module", True) for kind in REFUSED]
    for (kind, *_), ranks in zip(cases, in_two_processes(tmp_path, cases), strict=True):
        for rank in ranks:
            assert re.search(REFUSED[kind], rank["error"])
