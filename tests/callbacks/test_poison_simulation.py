from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from filter_kit import CLASSES, Data, Marked, N, Net, Stream, loader, report, table, trace
from foreign.cases import CASES
from foreign.data import image_columns
from foreign.runs import fit, make_trainer, portrait, seed_all
from test_data_filter import Noisy
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from robust_train import PGD, DataFilter, PoisonSimulation, Probe, Threat
from robust_train.poisoning.poisons.badnets import BadNets
from robust_train.poisoning.poisons.clean_label import CleanLabel
from robust_train.poisoning.poisons.conflicting_duplicates import ConflictingDuplicates
from robust_train.poisoning.poisons.random_flips import RandomFlips
from robust_train.starter import Classifier, Digits, SmallCNN


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Labelled(Net):
    """Remembers which label each row bore."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: dict[int, int] = {}

    def training_step(self, batch, batch_idx):
        self.labels |= dict(zip(batch[2].tolist(), batch[1].tolist(), strict=True))
        return super().training_step(batch, batch_idx)


def run(data, *callbacks, module=None, **settings):
    seed_all(0)
    module = Labelled() if module is None else module
    trainer = make_trainer(pl.Trainer, *callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    trainer.fit(module, data)
    return module, trainer


@pytest.mark.parametrize("source", ["loader", "data module"])
def test_the_same_rows_are_poisoned_in_every_run_and_the_users_data_stay_as_they_are(source):
    clean, masks = table(), []
    for seed in (0, 1):
        data, simulation = table(), PoisonSimulation(RandomFlips(rate=0.2), CLASSES)
        before = portrait(data.tensors)
        torch.manual_seed(seed)
        module, _ = run(loader(data) if source == "loader" else Data(data), simulation)
        assert portrait(data.tensors) == before
        wrong = [row for row, label in module.labels.items() if label != int(clean[row][1])]
        assert sorted(wrong) == np.flatnonzero(simulation.mask).tolist()
        masks.append(simulation.mask)
    assert (masks[0] == masks[1]).all()
    assert masks[0].sum() == round(0.2 * N)


def test_where_no_label_changes_much_else_the_run_is_the_users():
    """Inputs, order and random numbers are as without it; only the poisoned row is another."""

    def data():
        return {"train_dataloaders": DataLoader(Noisy(), 8, shuffle=True)}

    plain, poisoned = (
        trace(fit(CASES["tuple"], *c, data=data(), limit_val_batches=0))
        for c in ([], [PoisonSimulation(RandomFlips(rate=0.05), CLASSES)])
    )
    assert plain["rng"] == poisoned["rng"]
    assert [seen["rng"] for seen in plain["by_batch"]] == [seen["rng"] for seen in poisoned["by_batch"]]
    assert plain["module"]["net"] != poisoned["module"]["net"]


def test_rows_can_be_added():
    module, trainer = run(loader(table()), simulation := PoisonSimulation(ConflictingDuplicates(rate=0.1), CLASSES))
    assert len(simulation.mask) == N + 24
    assert sum(map(len, module.seen)) == N + 24
    own = loader(table(), shuffle=False, sampler=RandomSampler(range(N), replacement=True))
    with pytest.raises(ValueError, match="made for 240 rows, and there are 264"):
        run(own, PoisonSimulation(ConflictingDuplicates(rate=0.1), CLASSES))


def test_a_defence_is_told_what_it_found_and_the_report_says_so_first():
    simulation = PoisonSimulation(RandomFlips(rate=0.2), CLASSES)
    marked = DataFilter({"marked": Marked(tuple(range(0, N, 5)))})
    for order in ([simulation, marked], [marked, simulation]):
        run(loader(table()), *order)
        found = report()
        assert next(iter(found)) == "simulation"
        touched = np.arange(N) % 5 == 0
        assert found["simulation"]["poisoned_rows"] == simulation.mask.sum()
        assert found["simulation"]["poison"]["class"] == "RandomFlips"
        assert found["simulation"]["tpr"] == pytest.approx(touched[simulation.mask].mean())
        assert found["simulation"]["fpr"] == pytest.approx(touched[~simulation.mask].mean())
    run(loader(table()), DataFilter({"marked": Marked(())}))
    assert "simulation" not in report()


def test_clean_label_rows_are_crafted_on_a_copy_of_the_module():
    x, y = image_columns(60)

    class Counting(PGD):
        def perturb(self, victim, x, threat, generator):
            crafted.append(len(x))
            return super().perturb(victim, x, threat, generator)

    crafted: list[int] = []
    data = TensorDataset(x, y)
    before = portrait(data.tensors)
    poison = CleanLabel(rate=0.1, target=0)
    simulation = PoisonSimulation(poison, CLASSES, attack=Counting(steps=2), threat=Threat(eps=0.3))
    module, trainer = run(DataLoader(data, 16, shuffle=True), simulation, module=CASES["tuple"].module())
    assert portrait(data.tensors) == before
    assert sum(crafted) == simulation.mask.sum() == 6
    assert set(y[torch.from_numpy(simulation.mask)].tolist()) == {0}
    assert trainer.global_step == 4


REFUSED = [
    (lambda: PoisonSimulation("flips", 3), TypeError, "must be a robust_train Poison"),
    (lambda: PoisonSimulation(RandomFlips(rate=0.1), 1), ValueError, "classes must be a whole number >= 2"),
    (lambda: PoisonSimulation(RandomFlips(rate=0.1), 3, attack=PGD()), ValueError, "attack and threat belong together"),
]


@pytest.mark.parametrize(("make", "kind", "said"), REFUSED)
def test_settings_that_make_no_sense_are_refused(make, kind, said):
    with pytest.raises(kind, match=said):
        make()


def test_data_without_row_numbers_are_refused():
    with pytest.raises(ValueError, match="Stream is an iterable dataset"):
        run(DataLoader(Stream(), 16), PoisonSimulation(RandomFlips(rate=0.1), CLASSES))
    with pytest.raises(RuntimeError, match="poisoned nothing yet"):
        _ = PoisonSimulation(RandomFlips(rate=0.1), CLASSES).mask


def test_after_the_fit_the_trainer_is_as_before():
    _, trainer = run(loader(table()), PoisonSimulation(RandomFlips(rate=0.1), CLASSES))
    assert "exchanges" not in vars(trainer.fit_loop._data_source)


# --- does the default find what it is meant to find ----------------------------------------------------------------

FOUND = [
    pytest.param(RandomFlips(rate=0.2), 700, 0.8, 0.06, id="flips"),
    pytest.param(BadNets(rate=0.1, target=None, size=2), 1078, 0.8, 0.06, id="all to all"),
    pytest.param(None, 700, None, 0.025, id="clean"),
]


@pytest.mark.parametrize(("poison", "rows", "found", "false"), FOUND)
def test_poison_in_digits_is_found(poison, rows, found, false):
    digits = Digits()
    digits.setup("fit")
    x, y = (column[:rows] for column in digits.train.tensors)
    seed_all(0)
    callbacks = [DataFilter(probe=Probe(epochs=10))] + ([PoisonSimulation(poison, 10)] if poison else [])
    module = Classifier(SmallCNN(channels=16), lr=5e-3)
    run(DataLoader(TensorDataset(x, y), 64, shuffle=True), *callbacks, module=module)
    result = report()
    if poison is None:
        assert 1 - result["kept"] / result["rows"] <= false
    else:
        assert result["simulation"]["tpr"] >= found
        assert result["simulation"]["fpr"] <= false
