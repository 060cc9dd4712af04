"""Canaries in a private run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from foreign.runs import RecordingLogger, make_trainer
from planted_faults import HalfNoise, Uncounted
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from robust_train import DPSGD, PrivacyAudit

pytestmark = [
    pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 20))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class TenthNoise(DPSGD):
    """A wrong noise scale."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        entropy = self._running().entropy
        gaussian = entropy.gaussian
        entropy.gaussian = lambda *args: 0.1 * gaussian(*args)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(60, 6, generator=generator), torch.randint(20, (60,), generator=generator))
    return DataLoader(data, batch_size=20, shuffle=True)


def train(*callbacks, ckpt_path=None, **settings):
    module = Net()
    trainer = make_trainer(pl.Trainer, *callbacks, **{"max_epochs": 10, **settings})
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, trainer


def private(cls=DPSGD, **settings):
    usual = {"target_epsilon": 2.0, "target_delta": 1e-3, "engine": "book_keeping", "accountant": "rdp"}
    return cls(**{**usual, **settings})


@pytest.mark.parametrize("engine", ["book_keeping", "hooks"])
@pytest.mark.parametrize("first", [True, False])
def test_a_correct_run_is_consistent(engine, first):
    audit, dp = PrivacyAudit(canaries=500), private(engine=engine)
    _, trainer = train(*((audit, dp) if first else (dp, audit)))
    found = audit.result
    assert found is not None
    assert found["verdict"] == "consistent"
    assert found["epsilon_lower_bound"] < found["epsilon_claimed"] < found["ceiling"]
    assert found["certificate"]["epsilon"] <= 2.0 < found["epsilon_claimed"]  # at a smaller delta
    assert found["steps_seen"] == found["steps_claimed"] == trainer.global_step
    assert trainer.callback_metrics["audit/epsilon_lower_bound"] == pytest.approx(found["epsilon_lower_bound"])
    assert json.loads(Path("privacy_audit.json").read_text()) == found


def test_noise_that_is_too_small_is_rejected():
    audit = PrivacyAudit(canaries=500)
    with pytest.warns(UserWarning, match="PrivacyAudit: rejected. Epsilon"):
        train(audit, private(TenthNoise))
    assert audit.result is not None
    assert audit.result["verdict"] == "rejected"
    assert audit.result["epsilon_lower_bound"] > 2.0


def test_steps_that_nobody_counts_are_rejected():
    audit = PrivacyAudit(canaries=100)
    with pytest.warns(UserWarning, match="30 steps were taken, and 23 are accounted for"):
        train(audit, private(Uncounted, target_epsilon=None, noise_multiplier=2.0))
    assert audit.result is not None
    assert audit.result["verdict"] == "rejected"


def test_a_claim_beyond_the_ceiling_cannot_be_told():
    audit = PrivacyAudit(canaries=50)
    train(audit, private(HalfNoise, target_epsilon=9.0, target_delta=1e-4))
    assert audit.result is not None
    assert audit.result["verdict"] == "too weak to tell"
    assert audit.result["ceiling"] < audit.result["epsilon_claimed"]


def test_the_weights_are_those_without_canaries():
    dp = {"unsafe_seed": 5, "noise_multiplier": 1.0, "target_epsilon": None}
    plain, _ = train(private(**dp))
    audited, _ = train(PrivacyAudit(canaries=500), private(**dp))
    for a, b in zip(plain.parameters(), audited.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_resumed_run_goes_on_with_its_canaries():
    audit = PrivacyAudit(canaries=200)
    saved = ModelCheckpoint(".", filename="half")
    train(audit, private(), saved, max_epochs=5, enable_checkpointing=True)
    begun = audit.result
    audit = PrivacyAudit(canaries=200)
    train(audit, private(target_epsilon=4.0), ckpt_path="half.ckpt", max_epochs=10)
    assert begun is not None
    assert audit.result is not None
    assert (begun["steps_seen"], audit.result["steps_seen"]) == (15, 30)


def test_metrics_reach_the_logger():
    logger = RecordingLogger()
    train(PrivacyAudit(canaries=50), private(), max_epochs=1, logger=logger)
    assert any("audit/epsilon_lower_bound" in str(entry) for entry in logger.history)


@pytest.mark.parametrize("settings", [{"canaries": 0}, {"canaries": 2.5}, {"confidence": 1.0}, {"confidence": "high"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="privacy_audit"):
        PrivacyAudit(**settings)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "audits a DPSGD callback, and the Trainer has 0"),
        ([DPSGD(noise_multiplier=0.0)], "nothing to audit"),
        ([DPSGD(noise_multiplier=1.0, max_grad_norm=0.5)], "set canaries to 1640 or fewer"),
    ],
)
def test_what_cannot_be_audited_is_refused(callbacks, message):
    with pytest.raises(ValueError, match=message):
        train(PrivacyAudit(canaries=2000), *callbacks)
