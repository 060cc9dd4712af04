"""The membership audit after training."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import stat
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from foreign.cases import CASES
from foreign.runs import RecordingLogger, assert_same, fit, make_trainer, portrait
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from robust_train import DPSGD, PGD, AdversarialTraining, DataFilter, MembershipAudit, Threat
from robust_train.callbacks._references import Training, restart, snapshot
from robust_train.poisoning.filters.duplicates import Duplicates
from robust_train.privacy.attacks.lira_online import LiRAOnline
from robust_train.privacy.attacks.loss_threshold import LossThreshold
from robust_train.privacy.attacks.rmia import RMIA
from robust_train.privacy.output.label_only import LabelOnly
from robust_train.privacy.output.rounding import Rounding

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:MembershipAudit. the training step's loss of a batch:UserWarning"),
]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Net(pl.LightningModule):
    """Learns labels by heart that are mostly chance."""

    def __init__(self, width: int = 128, lr: float = 0.01) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def data(seed: int, n: int = 120) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 20, generator=generator)
    y = torch.where(
        torch.rand(n, generator=generator) < 0.5, (3 * x[:, 0]).long(), torch.randint(3, (n,), generator=generator)
    )
    return TensorDataset(x, y)


def loaders(n: int = 120) -> dict[str, DataLoader]:
    return {
        "train_dataloaders": DataLoader(data(0, n), batch_size=20, shuffle=True),
        "val_dataloaders": DataLoader(data(1, n), batch_size=20),
    }


def run(*callbacks, module=None, epochs: int, **settings):
    module = Net() if module is None else module
    trainer = make_trainer(pl.Trainer, *callbacks, max_epochs=epochs, limit_val_batches=0, **settings)
    trainer.fit(module, **loaders())
    return module, trainer


# --- what it finds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    """The audit of a model that learned by heart, its Trainer, its folder, and what was printed."""
    folder, said = tmp_path_factory.mktemp("by_heart"), io.StringIO()
    audit = MembershipAudit(outputs={"labels": LabelOnly(), "rounded": Rounding(1)}, exposed=7)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        torch.set_num_threads(1)  # the fixture that does so comes later
        _, trainer = run(audit, module=Net(lr=0.01), epochs=40)
    return audit, trainer, folder, said.getvalue()


def test_a_model_that_learned_by_heart_is_found_out(by_heart):
    audit, trainer, folder, said = by_heart
    found = json.loads((folder / "audit.json").read_text())
    assert found == json.loads(json.dumps(audit.result))
    assert (found["members"], found["others"], found["references"]) == (120, 120, 4)
    assert set(found["attacks"]) == {"loss_threshold", "rmia", "lira_offline"}
    assert found["attacks"]["rmia"]["low"] > 0.6
    worst = found["attacks"][found["worst"]]
    assert trainer.callback_metrics["audit/auc"] == pytest.approx(worst["auc"])
    assert trainer.callback_metrics["audit/tpr_at_fpr_0.01"] == pytest.approx(worst["tpr"]["0.01"]["value"])
    assert worst["tpr"]["0.001"] is None
    assert "audit/tpr_at_fpr_0.001" not in trainer.callback_metrics
    assert found["outputs"]["labels"]["rmia"]["auc"] < found["attacks"]["rmia"]["auc"]
    assert "rmia, labels" in said
    assert "n/a" in said


def test_the_most_exposed_are_in_a_file_of_their_owner_and_nowhere_else(by_heart):
    _, _, folder, said = by_heart
    path = folder / "most_exposed.csv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 7
    assert all(0 <= int(row["row"]) < 120 for row in rows)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(said.splitlines()) == 1 + 1 + 3 * 3  # a title, a header, three attacks on three kinds of answers
    assert not any("score" in key for key in json.loads((folder / "audit.json").read_text()))


def test_a_model_that_learned_nothing_leaks_nothing():
    audit = MembershipAudit("quick", epochs=3)
    run(audit, epochs=1)
    assert audit.result is not None
    leakage = audit.result["attacks"]["loss_threshold"]
    assert leakage["low"] < 0.55
    assert leakage["auc"] < 0.62


def test_no_file_of_records_where_none_is_asked_for():
    run(MembershipAudit("quick", exposed=0, epochs=1), epochs=1)
    assert Path("audit.json").is_file()
    assert not Path("most_exposed.csv").exists()


def test_metrics_reach_the_logger():
    logger = RecordingLogger()
    run(MembershipAudit(references=0), epochs=1, logger=logger)
    assert any("audit/loss_threshold/auc" in str(entry) for entry in logger.history)


# --- what it leaves alone -----------------------------------------------------------------------------------------


def test_the_run_and_the_random_generators_are_as_without_it():
    plain, _ = run(epochs=3)
    drawn = torch.rand(3)
    audited, trainer = run(MembershipAudit(), epochs=3)
    assert torch.equal(drawn, torch.rand(3))
    assert_same(portrait(plain.state_dict()), portrait(audited.state_dict()))
    assert [type(c).__name__ for c in trainer.callbacks].count("MembershipAudit") == 1


@pytest.mark.parametrize(
    "name", ["dict", "manual_accumulation", "gan", "regression", "segmentation", "momentum_teacher", "nasty", "unified"]
)
def test_foreign_modules_are_audited_and_trained_as_ever(name):
    case = CASES[name]
    place = {k: v for k, v in case.where.items() if k in ("inputs", "logits")}
    audit = MembershipAudit(references=4, epochs=1, **place)
    with_it = fit(case, audit)
    assert audit.result is not None
    assert_same(fit(case).trace["by_batch"], with_it.trace["by_batch"])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("engine", ["book_keeping", "hooks"])
def test_a_private_run_is_audited_when_its_hooks_are_gone(first, engine):
    audit = MembershipAudit(references=1)
    private = DPSGD(noise_multiplier=1.0, engine=engine, accountant="rdp")
    module, trainer = run(*((audit, private) if first else (private, audit)), epochs=4)
    assert audit.result is not None
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    assert audit.result["attacks"]["loss_threshold"]["auc"] < 0.65


@pytest.mark.parametrize("first", [True, False])
def test_a_hardened_run_is_audited_unchanged(first):
    audit = MembershipAudit(references=1, epochs=2)
    hardened = AdversarialTraining(PGD(steps=2), Threat(eps=0.01))
    run(*((audit, hardened) if first else (hardened, audit)), epochs=2)
    assert audit.result is not None


def test_members_of_a_filtered_run_are_the_rows_that_were_kept():
    class Twice(Net):
        def train_dataloader(self):
            x, y = data(0).tensors
            twice = TensorDataset(torch.cat([x, x[:10]]), torch.cat([y, (y[:10] + 1) % 3]))
            return DataLoader(twice, batch_size=20, shuffle=True)

        def val_dataloader(self):
            return DataLoader(data(1), batch_size=20)

    audit, filtering = MembershipAudit(references=1, epochs=1), DataFilter([Duplicates()])
    trainer = make_trainer(pl.Trainer, audit, filtering, max_epochs=1, limit_val_batches=0)
    trainer.fit(Twice())
    assert audit.result is not None
    assert audit.result["members"] == filtering.kept.sum() < 130


# --- references ---------------------------------------------------------------------------------------------------


def test_references_are_kept_and_used_again(tmp_path):
    cache = tmp_path / "kept"
    first = MembershipAudit(cache=str(cache), epochs=2)
    run(first, epochs=2)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    files = sorted(cache.iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    again = MembershipAudit(cache=str(cache), epochs=2)
    run(again, epochs=2)
    assert first.result is not None
    assert again.result is not None
    assert (first.result["references_from_cache"], again.result["references_from_cache"]) == (0, 4)
    assert first.result["attacks"] == again.result["attacks"]
    run(MembershipAudit(cache=str(cache), epochs=3), epochs=2)  # another recipe
    assert len(list(cache.iterdir())) == 8
    run(MembershipAudit(cache=str(cache), epochs=2), module=Net(width=64), epochs=2)  # another module
    assert len(list(cache.iterdir())) == 12


def test_a_reference_starts_anew_and_not_from_what_was_learned():
    class WithScale(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    module = WithScale()
    begin = snapshot(module)
    learned = copy.deepcopy(module)
    with torch.no_grad():
        for p in learned.parameters():
            p.add_(100.0)
    training = Training(1, "reset", begin, 20, None, 0)
    torch.manual_seed(7)
    restart(learned, training)
    weights = [p.detach().clone() for p in learned.parameters()]
    assert max(float(w.abs().max()) for w in weights) < 2
    assert torch.equal(learned.scale, module.scale)
    assert not torch.equal(learned.net[0].weight, module.net[0].weight)
    torch.manual_seed(8)
    restart(learned, training)
    assert not torch.equal(learned.net[0].weight, weights[1])
    restart(learned, Training(1, "initial", begin, 20, None, 0))
    assert all(torch.equal(a, b) for a, b in zip(learned.parameters(), module.parameters(), strict=True))


def test_a_parameter_that_nobody_can_reset_is_refused():
    module = Net()
    module.scale = nn.Parameter(torch.ones(3))
    begin = {k: v for k, v in snapshot(module).items() if k != "scale"}
    with pytest.raises(ValueError, match="cannot start reference models anew: scale"):
        restart(module, Training(1, "reset", begin, 20, None, 0))


def test_at_most_so_many_rows_are_audited():
    audit = MembershipAudit(references=4, epochs=1, max_rows=30)
    run(audit, epochs=1)
    assert audit.result is not None
    assert (audit.result["members"], audit.result["others"]) == (30, 30)


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "fast"}, "preset must be quick, standard or thorough, got 'fast'"),
        ({"start": "cold"}, "start must be reset or initial"),
        ({"holdout": "train"}, "holdout must be val, test, both or a dataset"),
        ({"holdout": 3}, "holdout must be val, test, both or a dataset"),
        ({"references": -1}, "references must be a whole number >= 0"),
        ({"epochs": 0}, "epochs must be a whole number >= 1"),
        ({"cache": ""}, "cache must be a name or path"),
        ({"attacks": {}}, "attacks must hold at least one attack"),
        ({"references": 0, "attacks": {"rmia": RMIA()}}, "RMIA needs at least 1 reference"),
        ({"references": 2, "attacks": {"lira": LiRAOnline()}}, "LiRAOnline needs at least 4 reference"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MembershipAudit(**settings)


@pytest.mark.parametrize(
    ("setting", "value"), [("attacks", [RMIA()]), ("attacks", {"a": 1}), ("outputs", {"a": RMIA()})]
)
def test_what_is_no_attack_or_output_is_refused(setting, value):
    with pytest.raises(TypeError, match=f"membership_audit.{setting}"):
        MembershipAudit(**{setting: value})


def test_a_run_without_non_members_is_refused_before_it_trains():
    trainer = make_trainer(pl.Trainer, MembershipAudit(), max_epochs=1)
    module = Net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="needs non-members, and holdout='val'"):
        trainer.fit(module, DataLoader(data(0), batch_size=20))
    assert_same(portrait(before), portrait(module.state_dict()))


def test_a_dataset_serves_as_holdout():
    audit = MembershipAudit(references=0, holdout=data(5, 77))
    trainer = make_trainer(pl.Trainer, audit, max_epochs=1, limit_val_batches=0)
    trainer.fit(Net(), DataLoader(data(0), batch_size=20))
    assert audit.result is not None
    assert audit.result["others"] == 77


def test_answers_of_a_task_without_classes_cannot_be_perturbed():
    audit = MembershipAudit(references=0, outputs={"rounded": Rounding()})
    with pytest.raises(ValueError, match="outputs can be perturbed of a classifier"):
        fit(CASES["regression"], audit, max_epochs=1)


def test_a_trial_run_trains_all_it_would_and_writes_nothing(capsys):
    trainer = make_trainer(pl.Trainer, MembershipAudit(attacks={"l": LossThreshold()}), fast_dev_run=True)
    trainer.fit(Net(), **loaders())
    assert "figures mean nothing" in capsys.readouterr().out
    assert not Path("audit.json").exists()
