"""On a CUDA device: fp16 with loss scaling, bf16, and that nothing changes at eps = 0."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from robust_train import PGD, TRADES, AdversarialTraining, RobustEvaluation, Threat
from robust_train.starter import Classifier, SmallCNN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fit(precision: str, *callbacks: pl.Callback) -> tuple[Classifier, pl.Trainer]:
    pl.seed_everything(0)
    x = torch.rand(256, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    model = Classifier(SmallCNN(channels=8), lr=1e-2)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="gpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        deterministic="warn",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    trainer.fit(model, loader, loader)
    return model, trainer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_eps_zero_is_bit_identical(precision):
    plain, _ = fit(precision)
    hardened, _ = fit(precision, AdversarialTraining(PGD(steps=3), Threat(eps=0.0)))
    for (name, a), (_, b) in zip(plain.state_dict().items(), hardened.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trains_and_evaluates(precision):
    threat = Threat(eps=0.05)
    _, trainer = fit(
        precision,
        AdversarialTraining(PGD(steps=5), threat, TRADES()),
        RobustEvaluation({"pgd": PGD(steps=5)}, threat),
    )
    metrics = trainer.callback_metrics
    assert float(metrics["val/robust_acc"]) <= float(metrics["val/clean_acc"])


def test_fp16_gradients_do_not_underflow():
    """A mean loss over many examples has gradients too small for fp16; scaled, the attack is as strong as in fp32."""
    found = {}

    class Spy(AdversarialTraining):
        def _train(self, module, call, crafted, victim):
            with torch.no_grad():
                found[precision] = float(F.cross_entropy(module.float()(crafted.x_adv), crafted.batch[1]))
            return super()._train(module, call, crafted, victim)

    for precision in ("32-true", "16-mixed"):
        fit(precision, Spy(PGD(steps=10), Threat(eps=0.1)))
    assert found["16-mixed"] == pytest.approx(found["32-true"], rel=0.1)
