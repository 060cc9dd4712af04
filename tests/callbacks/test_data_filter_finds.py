"""What data filtering finds, through which probes and filters, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from filter_kit import (
    BAD,
    BRIEF,
    CLASSES,
    WIDTH,
    Data,
    Marked,
    N,
    Net,
    Stream,
    checkpointed,
    even,
    flipped,
    loader,
    marking,
    rates,
    report,
    run,
    table,
)
from foreign.batches import TupleBatch
from foreign.data import image_columns
from foreign.data import loader as image_loader
from foreign.runs import make_trainer, portrait
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from robust_train import DPSGD, PGD, AdversarialTraining, DataFilter, Policy, Probe, Threat
from robust_train.callbacks import _filtering
from robust_train.callbacks._filter_refusals import refuse_what_cannot_work
from robust_train.poisoning.filters.activation_clustering import ActivationClustering
from robust_train.poisoning.filters.aum import AUM
from robust_train.poisoning.filters.base import Filter, Scores
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
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection:UserWarning"),
]


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


# --- what is found -------------------------------------------------------------------------------------------------


def test_wrong_labels_are_found_and_clean_rows_are_kept():
    data, bad = flipped(table(400))
    callback = DataFilter(probe=Probe(epochs=6))
    module, _ = run(callback, data)
    found, false = rates(callback, bad)
    assert found >= 0.9
    assert false <= 0.05
    assert not set(module.seen[0]) & set(np.flatnonzero(~callback.kept))
    run(clean := DataFilter(probe=Probe(epochs=6)), table(400))
    assert (~clean.kept).mean() <= 0.025


@pytest.mark.parametrize("trusted", ["val", "dataset", "rows", "array", "tensor"])
def test_trusted_rows_are_used_and_never_left_out(trusted):
    data, bad = flipped(table(300))
    checked = (~bad).nonzero()[:60, 0]
    given = {
        "val": "val",
        "dataset": table(60, seed=5),
        "rows": checked.tolist(),
        "array": checked.numpy(),
        "tensor": checked,
    }
    filters = [AUM(), TrustedMargin(), Marked(tuple(checked[:4].tolist()))]
    if trusted in ("val", "dataset"):
        filters.pop()
    callback = DataFilter(filters, trusted=given[trusted], trusted_size=60, probe=Probe(epochs=4))
    run(callback, Data(data))
    found, false = rates(callback, bad)
    assert found >= 0.85
    assert false <= 0.05
    assert report()["probe"]["trusted"] == (32 if trusted == "val" else 60)
    assert "trusted_margin" in report()["filters"]
    if trusted in ("rows", "array", "tensor"):
        assert callback.kept[checked.numpy()].all()


def test_two_trusted_margins_each_have_a_column():
    filters = {"warm": TrustedMargin(4.0), "cold": TrustedMargin(1.0)}
    run(DataFilter(filters, trusted=table(40, seed=5), probe=BRIEF))
    assert list(report()["filters"]) == ["warm", "cold"]


def test_that_too_few_rows_or_too_weak_a_model_decide_nothing_is_said(caplog):
    with caplog.at_level("INFO"):
        run(DataFilter([AUM(), SmallLoss()], probe=BRIEF), table(30))
        assert caplog.text.count("aum, small_loss: too few canaries to calibrate with: nothing is decided.") == 1
        run(DataFilter([AUM()], probe=BRIEF), module=Net(lr=0.0))
    assert caplog.text.count("DataFilter: aum: too weak to tell") == 1


def test_epochs_of_the_probe_and_of_references_are_told_apart():
    run(DataFilter([AUM()], trusted=table(40, seed=5), probe=BRIEF))
    assert (report()["probe"]["epochs"], report()["probe"]["reference_epochs"] % 4) == (2, 0)
    assert report()["probe"]["reference_epochs"] > 0


def test_the_report_adds_up_the_false_alarms_of_all_thresholds():
    run(DataFilter([AUM(), SmallLoss(), Spectral(), Duplicates()], probe=BRIEF), flipped(table())[0])
    rates = [f["calibration"].get("expected_fpr") for f in report()["filters"].values()]
    assert report()["expected_fpr"] == pytest.approx(sum(rate for rate in rates if rate is not None))
    assert "by the thresholds together" in Path("filter_report.html").read_text().replace("\n", " ")
    run(marking(predicate=even, filters={}))
    assert report()["expected_fpr"] is None


def test_without_calibration_rows_are_ranked_and_that_is_said():
    data, _ = flipped(table())
    callback = DataFilter([Spectral()], probe=BRIEF)
    with pytest.warns(UserWarning, match="spectral only ranks rows: no threshold could be calibrated"):
        run(callback, data)
    assert callback.kept.all()
    assert report()["outcome"].endswith("Ranked, and nothing decided: spectral.")
    assert len(set(read_decisions("filter_decisions.csv").columns[0].scores)) > N / 2


@pytest.mark.filterwarnings("ignore:DataFilter. .* only ranks rows:UserWarning")
@pytest.mark.parametrize(
    "method",
    [
        SmallLoss(),
        ConfidentLearning(),
        KNNLabels(),
        ActivationClustering(),
        Mahalanobis(),
        QUE(),
        NearDuplicates(),
        Duplicates(),
        IsolatedGroups(),
        Spectral(),
        AUM(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_filter_works_in_the_callback(method, probes):
    data, bad = flipped(table(300))
    callback = DataFilter([method], probe=Probe(epochs=3))
    run(callback, data)
    assert set(report()["filters"]) - {"reference_margin"} == {type(method).__module__.rpartition(".")[2]}
    assert bool(probes)
    if "label_noise" in method.finds:
        assert rates(callback, bad)[0] >= 0.7
    assert rates(callback, bad)[1] <= 0.08


def test_where_no_filter_asks_for_it_nothing_is_trained(probes):
    epochs = []

    class Counting(Net):
        def on_before_optimizer_step(self, optimizer):
            epochs.append(self.trainer.max_epochs)

    run(DataFilter([Duplicates(), KNNLabels()]), module=Counting(), max_epochs=2)
    assert report()["probe"]["epochs"] == 0
    assert epochs.count(1) <= 1


def test_the_probe_can_be_a_checkpoint(probes):
    data, bad = flipped(table(300))
    saving, settings = checkpointed()
    run(None, table(300, seed=7), *saving, **{**settings, "max_epochs": 8})
    callback = DataFilter([ConfidentLearning()], probe=Probe(checkpoint="first/last.ckpt"))
    run(callback, data)
    found, false = rates(callback, bad)
    assert found >= 0.9
    assert false <= 0.05
    with pytest.raises(ValueError, match="aum watch a probe while it is trained.*leave the checkpoint out"):
        run(DataFilter([AUM()], probe=Probe(checkpoint="first/last.ckpt")), data)
    with pytest.raises(ValueError, match="probe.checkpoint='first/last.ckpt' does not fit TupleBatch"):
        run(
            DataFilter([KNNLabels()], probe=Probe(checkpoint="first/last.ckpt")),
            image_loader(*image_columns()),
            module=TupleBatch(),
        )
    with pytest.raises(ValueError, match="probe.checkpoint='none.ckpt' does not fit Net: .*No such file"):
        run(DataFilter([KNNLabels()], probe=Probe(checkpoint="none.ckpt")), data)


class Residual(Net):
    """Its logits are a sum, and its features nobody's input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU()), nn.Linear(16, CLASSES)
        self.shortcut = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.side(self.body(x)) + self.shortcut(x)


class Functional(Net):
    """No layer returns the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Flatten()), nn.Parameter(torch.randn(32, CLASSES))
        del self.net

    def forward(self, x):
        return self.body(x[:, None]) @ self.weight


@dataclass(frozen=True)
class Wide(Filter):
    """Tells how wide the features are."""

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    finds: ClassVar[frozenset[str]] = frozenset({"outliers"})

    def score(self, rows):
        return Scores(torch.full((len(rows),), float(rows.features.shape[1])))


@pytest.mark.filterwarnings("ignore:DataFilter. wide only ranks rows:UserWarning")
@pytest.mark.parametrize(
    ("module", "settings", "width"),
    [
        (Net, {}, 16),
        (Residual, {}, 6),
        (Residual, {"features": "side"}, 16),
        (Net, {"features": "net.1"}, 16),
        (Net, {"features": "net.0", "logits": "net"}, 6),
        (Functional, {"features": "body.1"}, 32),
    ],
)
def test_which_features_are_looked_at(module, settings, width):
    run(DataFilter({"wide": Wide()}, probe=BRIEF, **settings), module=module())
    assert read_decisions("filter_decisions.csv").columns[0].scores[0] == width


@pytest.mark.filterwarnings("ignore:DataFilter. wide only ranks rows:UserWarning")
def test_features_can_come_from_elsewhere():
    extractor = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 5)).train()
    before, seen = portrait(extractor), []
    extractor[2].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    filters = {"wide": Wide(), "margin": TrustedMargin()}
    run(DataFilter(filters, probe=Probe(epochs=1, extractor=extractor), trusted=table(40, seed=5)))
    assert read_decisions("filter_decisions.csv").columns[0].scores[0] == 5
    assert sum(seen) == N
    assert portrait(extractor) == before


def test_features_that_are_not_found_are_asked_for():
    with pytest.raises(ValueError, match=r"no layer that returns the logits.*features=.*extractor"):
        run(DataFilter({"wide": Wide()}, probe=BRIEF), module=Functional())
    with pytest.raises(ValueError, match="features='nets' is no submodule of Net; its children are: net"):
        run(DataFilter({"wide": Wide()}, probe=BRIEF, features="nets"))
    with pytest.raises(ValueError, match="logits='nets' is no submodule of Net"):
        run(DataFilter([AUM()], probe=BRIEF, logits="nets"))


class Tokens(Net):
    """Words, and labels in a column."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.net = nn.EmbeddingBag(20, 8), nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        x, y, row = batch
        self.seen[-1] += row.tolist()
        return F.cross_entropy(self.net(self.words(x)), y.squeeze(1))


def test_tokens_and_labels_in_a_column_are_judged():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % CLASSES
    x = torch.randint(0, 6, (300, 5), generator=g) + 6 * y[:, None]
    bad = torch.rand(300, generator=g) < 0.2
    y = torch.where(bad, (y + 1) % CLASSES, y)
    data = TensorDataset(x, y[:, None], torch.arange(300))
    callback = DataFilter([AUM(), IsolatedGroups(), Duplicates()], probe=Probe(epochs=4))
    run(callback, data, module=Tokens())
    found, false = rates(callback, bad)
    assert found >= 0.8
    assert false <= 0.05


class Binary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1])


def test_one_score_an_example_is_judged_as_two_classes():
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(300) % 2).float()
    x = torch.randn(300, WIDTH, generator=g) + 3 * y[:, None]
    bad = torch.rand(300, generator=g) < 0.15
    callback = DataFilter([AUM(), ConfidentLearning()], probe=Probe(epochs=4))
    run(callback, TensorDataset(x, torch.where(bad, 1 - y, y)), module=Binary())
    found, false = rates(callback, bad)
    assert found >= 0.8
    assert false <= 0.05
    assert len(report()["classes"]) == 2


class Photos(TupleBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, CLASSES))


def test_coloured_images_that_are_augmented_at_random_are_judged_without_digests():
    class Augmented(Dataset):
        def __init__(self) -> None:
            x, self.y = image_columns(240)
            self.x = x.expand(-1, 3, -1, -1).clone()
            self.bad = torch.rand(240, generator=torch.Generator().manual_seed(0)) < 0.15
            self.y = torch.where(self.bad, (self.y + 1) % CLASSES, self.y)

        def __len__(self) -> int:
            return 240

        def __getitem__(self, i):
            return self.x[i] + 0.05 * torch.randn(3, 8, 8), self.y[i]

    data = Augmented()
    callback = DataFilter([AUM(), IsolatedGroups()], probe=Probe(epochs=6))
    run(callback, data, module=Photos())
    found, false = rates(callback, data.bad)
    assert found >= 0.8
    assert false <= 0.05
    assert report()["data"]["digests"] is False
    assert read_decisions("filter_decisions.csv").digests is None
    assert np.load("filter_suspicious.npy").shape[1:] == (3, 8, 8)
    run(DataFilter(mask="."), data, module=Photos())


def test_rows_of_a_kind_without_digests_are_judged():
    class Words(Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i):
            return (*table()[i], object())

    data = loader(Words(), collate_fn=lambda rows: [torch.stack(c) for c in list(zip(*rows, strict=True))[:3]])
    module, _ = run(marking(), data)
    assert sorted(module.seen[0]) == sorted(set(range(N)) - set(BAD))
    assert report()["data"]["digests"] is False


def test_adversarial_training_and_filtering_go_together(probes):
    data, bad = flipped(table(300))
    attacked = []

    class Counting(PGD):
        def perturb(self, victim, x, threat, generator):
            attacked.append(len(x))
            return super().perturb(victim, x, threat, generator)

    ball = Threat(eps=0.1, low=-100.0, high=100.0)
    for order in (0, 1):
        callbacks = [DataFilter([AUM()], probe=Probe(epochs=4)), AdversarialTraining(Counting(steps=1), ball)]
        attacked.clear()
        module, _ = run(None, data, *(callbacks[::-1] if order else callbacks))
        found, false = rates(callbacks[0], bad)
        assert found >= 0.8
        assert false <= 0.05
        assert sum(attacked) == callbacks[0].kept.sum()
        assert not set(module.seen[0]) & set(np.flatnonzero(~callbacks[0].kept))
    assert probes


# --- predicates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_predicate_filters_a_stream(workers):
    data = DataLoader(Stream(), batch_size=16, num_workers=workers)
    module, _ = run(DataFilter(predicate=even), data)
    assert module.seen == [list(range(0, N, 2))]
    assert not list(Path().glob("filter*"))


def test_a_predicate_filters_rows():
    callback = DataFilter(predicate=even)
    module, _ = run(callback)
    assert sorted(module.seen[0]) == list(range(0, N, 2))
    assert report()["outcome"] == "120 of 240 rows (50.00 %) are quarantined."
    assert len(Quarantine.read(".").entries) == 120


def test_a_predicate_and_filters_go_together():
    callback = marking(predicate=even, policy=Policy("downweight", weight=0.5))
    module, _ = run(callback)
    assert set(np.flatnonzero(callback.kept)) == set(range(0, N, 2))
    assert len(module.seen[0]) == 120
    assert set(module.seen[0]) <= set(range(0, N, 2))
    decisions = read_decisions("filter_decisions.csv")
    assert (decisions.decision[1::2] == "drop").all()
    assert set(np.flatnonzero(decisions.decision == "downweight")) == {r for r in BAD if r % 2 == 0}


def never(example) -> bool:
    return False


@pytest.mark.parametrize("workers", [0, 1])
def test_a_predicate_that_drops_a_whole_stream_is_said(workers):
    with pytest.raises(ValueError, match=f"DataFilter's predicate never dropped every one of the {N} examples of St"):
        run(DataFilter(predicate=never), DataLoader(Stream(), batch_size=16, num_workers=workers))


def report_of_predicate(data, module=None, **settings):
    run(DataFilter(predicate=lambda row: float(row[0].sum()) < 4, **settings), data, module=module)
    return report(), read_decisions("filter_decisions.csv").labels.tolist()


class Regression(Net):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


@pytest.mark.parametrize("kind", ["tensors", "numbers", "arrays", "named"])
def test_a_predicate_alone_writes_the_labels_that_the_examples_have(kind):
    x, y, row = table().tensors
    examples = {
        "tensors": list(table()),
        "numbers": [(x[i], int(y[i]), i) for i in range(N)],
        "arrays": [(x[i].numpy(), np.int64(y[i]), np.int64(i)) for i in range(N)],
        "named": [(x[i], {"row": i, "label": y[i, None]}) for i in range(N)],
    }[kind]
    module = Net() if kind != "named" else Regression()
    found, labels = report_of_predicate(loader(Listed(examples)), module)
    assert labels == y.tolist()
    assert [c["rows"] for c in found["classes"]] == [80, 80, 80]
    assert "note" not in found["filters"]["predicate"]["calibration"]


@pytest.mark.parametrize(
    "labels", [torch.rand(N), torch.arange(N), torch.rand(N, CLASSES)], ids=["float", "row", "soft"]
)
def test_a_predicate_alone_says_where_no_labels_were_found(labels):
    found, written = report_of_predicate(TensorDataset(table().tensors[0], labels), Regression())
    assert written == [0] * N
    assert "every row bears label 0 here" in found["filters"]["predicate"]["calibration"]["note"]


def test_a_predicate_may_refuse_examples_of_any_form():
    class Torn(Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i):
            return None if i % 7 == 0 else table()[i]

    module, _ = run(DataFilter(predicate=lambda row: row is not None), loader(Torn()))
    assert sorted(module.seen[0]) == [i for i in range(N) if i % 7]


class Listed(Dataset):
    def __init__(self, items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def whole_batches():
    return DataLoader(Listed([table()[i : i + 16] for i in range(0, N, 16)]), batch_size=None, shuffle=True)


@pytest.mark.parametrize("settings", [{}, {"trusted": [0, 1]}, {"when": "during", "filters": [AUM()]}], ids=str)
def test_filters_refuse_a_dataset_of_whole_batches(settings, probes):
    with pytest.raises(ValueError, match=r"batch_size=None, so that every item .* is a whole batch.*predicate=…"):
        run(DataFilter(**settings), whole_batches(), max_epochs=5)
    assert not probes


def test_a_dataset_that_is_asked_for_several_rows_at_once_is_judged(probes):
    data = flipped(table())[0]

    def unbatched():
        return DataLoader(data, sampler=BatchSampler(RandomSampler(data), 16, drop_last=False), batch_size=None)

    with pytest.raises(ValueError, match="data_filter.trusted cannot be a dataset where .* give their numbers"):
        run(DataFilter(trusted=table(40, seed=5)), unbatched())
    assert not probes
    run(DataFilter([AUM()], trusted=range(40), probe=BRIEF), unbatched())
    assert report()["rows"] == N


def test_a_predicate_is_told_whole_batches_where_the_dataset_has_such():
    module, _ = run(DataFilter(predicate=lambda batch: int(batch[2][0]) < 160), whole_batches())
    assert sorted(module.seen[0]) == list(range(160))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Stream is an iterable dataset: give DataFilter a predicate="),
        ({"predicate": even, "filters": [AUM()]}, "Stream is an iterable dataset, whose rows cannot be compared"),
        ({"predicate": even, "quarantine": "q.json"}, "rows have no numbers"),
    ],
)
def test_what_cannot_be_done_with_a_stream_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        run(DataFilter(**settings), DataLoader(Stream(), batch_size=16))


def test_private_training_works_with_a_predicate_and_with_nothing_else():
    private = {"noise_multiplier": 1.0, "accountant": "rdp"}
    module = Plain()
    callback = DPSGD(**private)
    run(DataFilter(predicate=even), None, callback, module=module, max_epochs=4)
    drawn = {row for rows in module.seen for row in rows}
    assert drawn <= set(range(0, N, 2))
    assert len(drawn) > 100
    assert {rate for _, rate, _ in callback.history} == {16 / 120}
    with pytest.raises(
        ValueError, match=r"filters=\['aum'\].*DPSGD's guarantee does not hold: use DataFilter\(predicate"
    ):
        run(DataFilter([AUM()]), None, DPSGD(**private))


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    ({"filters": []}, ValueError, "filters is empty"),
    ({"filters": AUM()}, TypeError, "must be a list of filters"),
    ({"filters": [3]}, TypeError, "must be a robust_train Filter, got 3"),
    ({"filters": [AUM(), AUM()]}, ValueError, "two of a kind need names of their own"),
    ({"filters": {"a/b": AUM()}}, ValueError, "'a/b' cannot be a filter's name"),
    ({"filters": {"predicate": AUM()}}, ValueError, "'predicate' cannot be a filter's name"),
    ({"filters": [TrustedMargin()]}, ValueError, "trusted_margin needs trusted rows"),
    ({"policy": "drop"}, TypeError, "policy must be a robust_train Policy"),
    ({"probe": 3}, TypeError, "probe must be a robust_train Probe"),
    ({"predicate": 3}, TypeError, "predicate must be a function of one example"),
    ({"predicate": even, "mask": "m"}, ValueError, "mask and predicate cannot be combined"),
    ({"predicate": even, "trusted": "val"}, ValueError, "name a filter, or leave trusted out"),
    ({"trusted": "test"}, ValueError, "trusted must be a dataset, row numbers or 'val'"),
    ({"trusted": 5}, TypeError, "data_filter.trusted must be a dataset, row numbers or 'val', got 5"),
    ({"trusted": DataLoader(range(3))}, TypeError, "data_filter.trusted must be a dataset, row numbers or 'val'"),
    ({"trusted_size": 10}, ValueError, "trusted_size must be >= 2, and needs trusted="),
    ({"trusted": "val", "trusted_size": 1}, ValueError, "trusted_size must be >= 2"),
    ({"when": "after"}, ValueError, "when must be 'before' or 'during'"),
    ({"when": "during", "filters": [KNNLabels()]}, ValueError, "knn_labels cannot judge rows while the run trains"),
    ({"when": "during", "filters": [AUM()], "predicate": even}, ValueError, "predicate and when='during'"),
    ({"when": "during", "filters": [AUM()], "trusted": [1, 2]}, ValueError, "trusted and when='during'"),
    ({"warmup_epochs": True}, ValueError, "warmup_epochs must be a whole number"),
]


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"epochs": 0}, ValueError, "probe.epochs must be a whole number >= 1"),
        ({"epochs": 2.5}, ValueError, "probe.epochs must be a whole number >= 1"),
        ({"epochs": True}, ValueError, "probe.epochs must be a whole number >= 1"),
        ({"seed": -1}, ValueError, "probe.seed must be a whole number >= 0"),
        ({"seed": None}, ValueError, "probe.seed must be a whole number >= 0"),
        ({"extractor": "resnet"}, TypeError, "probe.extractor must be a torch module"),
        ({"epochs": 2, "checkpoint": "a.ckpt"}, ValueError, "epochs must be left out with probe.checkpoint"),
        ({"canaries": 0.5}, ValueError, "probe.canaries must be a share"),
    ],
)
def test_probes_that_make_no_sense_are_refused(settings, kind, said):
    with pytest.raises(kind, match=said):
        Probe(**settings)


@pytest.mark.parametrize(("settings", "kind", "said"), REFUSED, ids=[r[2] for r in REFUSED])
def test_settings_that_make_no_sense_are_refused(settings, kind, said):
    with pytest.raises(kind, match=said):
        DataFilter(**settings)


@pytest.mark.parametrize(
    ("trusted", "said"),
    [
        ([1, N], f"row numbers below {N}, got 1 to {N}"),
        ([-1, 3], "row numbers below"),
        ([1, 1, 2], "2 or more row numbers|different row numbers"),
        ([0.5, 0.7], "a dataset or"),
        ([7], "a dataset or"),
        (TensorDataset(torch.zeros(1, WIDTH)), "2 at least"),
        (Stream(), "2 at least"),
        ("val", "the run has no validation data"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trusted_rows_that_are_none_are_refused(trusted, said):
    with pytest.raises(ValueError, match=said):
        run(DataFilter(trusted=trusted))


@pytest.mark.parametrize(
    ("trusted", "said"),
    [
        (TensorDataset(torch.zeros(9, WIDTH + 1), *table(9).tensors[1:]), r"and has \(float32 \(7,\), int64"),
        (TensorDataset(*table(9).tensors[:2]), r"and has \(float32 \(6,\), int64 \(\)\): they make no"),
        (Listed([{"x": row[0], "y": row[1]} for row in table(9)]), r"and has \{'x': float32 \(6,\), 'y': int64"),
    ],
    ids=["shape", "length", "structure"],
)
def test_trusted_rows_of_another_form_are_refused_before_anything_is_trained(trusted, said, probes):
    with pytest.raises(ValueError, match=f"data_filter.trusted must have rows like the training data's, .*{said}"):
        run(DataFilter(trusted=trusted))
    assert not probes


def test_rows_of_one_class_are_refused():
    x, _, row = table().tensors
    with pytest.raises(ValueError, match="compare classes, and all 240 training rows have the label 2.*predicate=…"):
        run(DataFilter([AUM()], probe=BRIEF), TensorDataset(x, torch.full((N,), 2), row))
    by_class = TensorDataset(x, torch.arange(N) // (N // CLASSES), row)
    run(quick := DataFilter([AUM()]), loader(by_class), fast_dev_run=True)  # looks at the first rows only
    assert quick.kept.all()


def strings(rows):
    x, y, _ = zip(*rows, strict=True)
    return torch.stack(x), [f"class {label}" for label in y]


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (strings, r"A batch is \(float32 \(16, 6\), list of str\)"),
        (
            lambda rows: (torch.stack([r[0] for r in rows]), torch.rand(16) - 2),
            r"\(float32 \(16, 6\), float32 \(16,\)\)",
        ),
    ],
    ids=["strings", "floats"],
)
def test_labels_that_are_no_classes_are_named(collate, said):
    with pytest.raises(ValueError, match=f"labels with labels=.*predicate=….*{said}"):
        run(DataFilter([AUM()], probe=BRIEF), loader(table(), collate_fn=collate), module=Regression())


def test_what_cannot_be_combined_is_refused_before_anything_is_trained(probes):
    class TakesIterator(Net):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(ValueError, match=r"dataloader_iter.*take training_step\(self, batch, batch_idx\)"):
        run(marking(), module=TakesIterator())
    trainer = make_trainer(pl.Trainer, marking())
    trainer.callbacks.append(marking())
    with pytest.raises(ValueError, match="two DataFilter callbacks in one Trainer"):
        trainer.fit(Net(), loader(table()))
    strategy = ModelParallelStrategy()
    trainer = SimpleNamespace(strategy=strategy, callbacks=[])
    with pytest.raises(ValueError, match=r"cannot work with strategy ModelParallelStrategy: .*DataFilter\(mask=…\)"):
        refuse_what_cannot_work(trainer, Net(), marking())
    refuse_what_cannot_work(trainer, Net(), DataFilter(mask="m"))
    trainer.strategy = object.__new__(FSDPStrategy)
    with pytest.raises(ValueError, match="DataFilter cannot work with strategy FSDPStrategy"):
        refuse_what_cannot_work(trainer, Net(), marking())
    assert not probes


def dropping(rows):
    x, y, row = (torch.stack(column) for column in zip(*rows, strict=True))
    keep = row % 5 > 0
    return x[keep], y[keep], row[keep]


def test_data_whose_rows_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="16 rows came out of the collate function with .* labels.*Return every row"):
        run(DataFilter([AUM()], probe=BRIEF), loader(table(), collate_fn=dropping))
    with pytest.raises(ValueError, match="the loader delivered 192 of 240 rows"):
        run(marking(), loader(table(), collate_fn=dropping))
    x, y, row = table().tensors
    with pytest.raises(ValueError, match=r"labels such as \[-100.*Leave unlabelled rows out"):
        run(DataFilter([AUM()], probe=BRIEF), TensorDataset(x, torch.where(row % 7 == 0, -100, y), row))
    with pytest.raises(ValueError, match="shape"):
        run(marking(), loader(Ragged(), batch_size=1), module=Pooled())


class Ragged(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i):
        return torch.rand(1 + i % 3, WIDTH), i % CLASSES, i


class Pooled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.net(x.mean(1))


def test_rows_of_different_shapes_are_judged_by_what_does_not_compare_inputs():
    run(DataFilter([AUM()], probe=BRIEF), loader(Ragged(), batch_size=1), module=Pooled())
    assert report()["rows"] == 12


@pytest.mark.parametrize(
    "settings", [{"filters": [AUM()]}, {"filters": [Duplicates()]}, {"filters": [AUM()], "when": "during"}], ids=str
)
def test_rows_whose_inputs_are_not_finite_are_named(settings):
    x, y, row = table().tensors
    x[[3, 17, 40, 41, 90, 100, 200], 0] = torch.tensor([torch.nan, torch.inf, *[torch.nan] * 5])
    some = r"(\d+, )*\d+" if "when" in settings else "3, 17, 40, 41, 90 and 2 more"
    with pytest.raises(ValueError, match=f"^DataFilter: rows {some} have inputs that are not finite.*Mend these rows"):
        run(DataFilter(probe=BRIEF, **settings), TensorDataset(x, y, row), max_epochs=5)


def test_a_module_that_mends_its_inputs_itself_is_judged():
    class Mending(Net):
        def forward(self, x):
            return self.net(x.nan_to_num())

    x, y, row = table().tensors
    x[3, 0] = torch.nan
    run(DataFilter(probe=BRIEF), TensorDataset(x, y, row), module=Mending())
    assert report()["rows"] == N


def test_a_probe_that_diverges_is_said():
    with pytest.raises(ValueError, match="though the inputs are: it diverged.*learning rate.*Probe.epochs"):
        run(DataFilter([AUM()], probe=BRIEF), module=Net(lr=float("inf")))


def test_a_loader_that_brings_rows_back_is_refused_before_a_probe_is_trained(probes):
    class Own(DataLoader):
        def __iter__(self):
            return iter(DataLoader(table(), 16))

    with pytest.raises(ValueError, match="does not read its rows from self.dataset"):
        run(DataFilter([AUM()]), Own(table(), 16))
    assert not probes


@pytest.mark.parametrize("count", [193, 241])
def test_no_batch_of_a_probe_has_a_single_row(count):
    """Batch normalisation cannot learn from one."""
    data, _ = flipped(table(count))
    callback = DataFilter([AUM()], probe=BRIEF)
    run(callback, loader(data, drop_last=True))
    assert len(callback.kept) == count


class Plain(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, CLASSES)


@pytest.mark.parametrize(
    ("module", "settings", "kept"), [(Net, {}, 226), (Net, {"drop_last": True}, 225), (Plain, {}, 225)]
)
def test_no_batch_of_the_run_has_a_single_row_where_it_has_batch_normalisation(module, settings, kept, caplog):
    bad = range(0, N, 16)  # 225 rows remain, one more than 14 batches
    callback = marking(bad)
    with caplog.at_level("INFO"):
        run(callback, loader(table(), **settings), module=module())
    assert ("Row 0 is kept, though flagged" in caplog.text) == (kept == 226)
    assert callback.kept.sum() == kept
    assert report()["capped"] == kept - 225
