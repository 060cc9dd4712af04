from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import RecordingLogger, assert_same, fit, make_trainer, portrait
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from robust_train import FGSM, PGD, Attack, ClassifierVictim, RobustEvaluation, Threat, UniformNoise, evaluate

EPS = 0.06
THREAT = Threat(eps=EPS)
FIXED = {"pgd": PGD(steps=4, random_start=False), "fgsm": FGSM()}  # draw nothing, so that others can repeat them


class Linear(TupleBatch):
    """Half trained, so that some examples are wrong, some are robust and some are neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        x, y = image_columns(60, seed=5)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(self(x), y).backward()
            optimizer.step()
        self.zero_grad()


def validate(*callbacks, module=None, loaders=None, stage="validate", **settings):
    trainer = make_trainer(pl.Trainer, *callbacks, **settings)
    loaders = loader(*image_columns(60, seed=1)) if loaders is None else loaders
    getattr(trainer, stage)(Linear() if module is None else module, loaders, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "val/"), ("test", "test/")])
def test_the_metrics_and_their_order(stage, prefix):
    found = validate(RobustEvaluation({**FIXED, "noise": UniformNoise()}, THREAT), stage=stage)
    ours = {name.removeprefix(prefix): value for name, value in found.items() if name != "val_loss"}
    assert ours.keys() == {"clean_acc", "robust_acc", "robust_acc_pgd", "robust_acc_fgsm", "robust_acc_noise"}
    assert 0 < ours["robust_acc"] < ours["clean_acc"] < 1
    assert all(ours["robust_acc"] <= ours[f"robust_acc_{name}"] <= ours["clean_acc"] for name in ("pgd", "noise"))


def test_the_worst_case_is_counted_example_by_example():
    """Two attacks that each fool other examples: the worst case is below both."""

    @dataclass(frozen=True)
    class Half(Attack):
        needs: ClassVar[frozenset[str]] = frozenset({"logits", "labels"})
        rows: int

        def perturb(self, victim, x, threat, generator):
            x_adv = PGD(steps=4, random_start=False)(victim, x, threat)
            keep = (victim.labels % 2 == self.rows).view(-1, 1, 1, 1)
            return torch.where(keep, x_adv, x)

    module, (x, y) = Linear(), image_columns(60, seed=1)
    module.eval()
    victim = ClassifierVictim(module, y)
    right = module(x).argmax(1) == y
    standing = module(PGD(steps=4, random_start=False)(victim, x, THREAT)).argmax(1) == y
    even = torch.where(y % 2 == 0, standing & right, right)
    odd = torch.where(y % 2 == 1, standing & right, right)
    found = validate(RobustEvaluation({"even": Half(0), "odd": Half(1)}, THREAT))
    expected = {"clean_acc": right, "robust_acc_even": even, "robust_acc_odd": odd, "robust_acc": even & odd}
    for name, verdict in expected.items():
        assert found[f"val/{name}"] == pytest.approx(float(verdict.float().mean()), abs=1e-6)
    assert found["val/robust_acc"] < min(found["val/robust_acc_even"], found["val/robust_acc_odd"])


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_equals_evaluate_on_the_same_data(precision):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    x, y = image_columns(60, seed=1)
    data = loader(x.to(dtype), y)
    module = Linear()
    measured = evaluate(module.to(dtype), data, THREAT, FIXED)
    found = validate(RobustEvaluation(FIXED, THREAT), module=module, loaders=data, precision=precision)
    assert found["val/clean_acc"] == pytest.approx(measured.clean_acc, abs=1e-6)
    assert found["val/robust_acc"] == pytest.approx(measured.robust_acc, abs=1e-6)
    for name, value in measured.robust_acc_by_attack.items():
        assert found[f"val/robust_acc_{name}"] == pytest.approx(value, abs=1e-6)


def test_equals_evaluate_with_random_starts_too():
    module, data = Linear(), loader(*image_columns(60, seed=1))
    attack = PGD(steps=2, restarts=2)
    measured = evaluate(module, data, THREAT, attack, seed=4)
    found = validate(RobustEvaluation(attack, THREAT, seed=4), module=module, loaders=data)
    assert found["val/robust_acc"] == pytest.approx(measured.robust_acc, abs=1e-6)


def test_can_be_repeated():
    attack = PGD(steps=2, restarts=2)
    assert validate(RobustEvaluation(attack, THREAT)) == validate(RobustEvaluation(attack, THREAT))


def test_segmentation_counts_pixels():
    case = CASES["segmentation"]
    data = case.data()["val_dataloaders"]
    module = fit(case, max_epochs=4).module.eval()
    clean, robust = [], []
    for x, y in data:
        x_adv = FIXED["pgd"](ClassifierVictim(module, y), x, THREAT)
        clean.append((module(x).argmax(1) == y).float().mean((1, 2)))
        robust.append(torch.minimum((module(x_adv).argmax(1) == y).float().mean((1, 2)), clean[-1]))
    found = validate(RobustEvaluation({"pgd": FIXED["pgd"]}, THREAT), module=module, loaders=data)
    assert found["val/clean_acc"] == pytest.approx(float(torch.cat(clean).mean()), abs=1e-6)
    assert found["val/robust_acc"] == pytest.approx(float(torch.cat(robust).mean()), abs=1e-3)
    assert 0 < found["val/robust_acc"] < found["val/clean_acc"]


@pytest.mark.parametrize("returns", [True, False], ids=["its loss", "nothing"])
def test_regression_logs_losses(returns):
    case = CASES["regression"]

    class Module(case.module):
        def validation_step(self, batch, batch_idx):
            loss = self.criterion(self(batch[0]), batch[1])
            return loss if returns else None

    torch.manual_seed(0)
    module, data = Module(), case.data()["val_dataloaders"]
    found = validate(RobustEvaluation(FIXED, case.ball(EPS)), module=module, loaders=data)
    losses = torch.tensor([float(module.criterion(module(x), y)) * len(x) for x, y in data])
    assert found["val/clean_loss"] == pytest.approx(float(losses.sum()) / 12, rel=1e-5)
    assert found["val/robust_loss"] > found["val/clean_loss"]
    assert found["val/robust_loss"] >= max(found["val/robust_loss_pgd"], found["val/robust_loss_fgsm"]) - 1e-6


def test_only_standing_examples_are_attacked():
    sizes: list[int] = []

    class Module(Linear):
        def validation_step(self, batch, batch_idx):
            sizes.append(len(batch[0]))
            return super().validation_step(batch, batch_idx)

    module, (x, y) = Module(), image_columns(60, seed=1)
    right = int((module(x).argmax(1) == y).sum())
    data = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=60)
    found = validate(RobustEvaluation(PGD(steps=20), THREAT), module=module, loaders=data)
    assert sizes[-1] == 60  # the user's own call
    attack = [size for size in sizes[1:-1] if size < 60]
    assert attack[0] == right < 60
    *steps, scoring = attack
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0] == scoring
    assert found["val/robust_acc"] * 60 <= steps[-1] + 1e-3


def test_an_attack_of_ones_own_need_not_be_a_dataclass():
    class Darker(Attack):
        def perturb(self, victim, x, threat, generator):
            return x - threat.radius

    found = validate(RobustEvaluation(Darker(), THREAT))
    assert found["val/robust_acc_darker"] <= found["val/clean_acc"]


def test_several_loaders_are_pooled():
    x, y = image_columns(60, seed=1)
    split = [loader(x[:20], y[:20]), loader(x[20:], y[20:])]

    class Module(Linear):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    together = validate(RobustEvaluation(FIXED, THREAT))
    apart = validate(RobustEvaluation(FIXED, THREAT), module=Module(), loaders=split)
    for name in ("val/clean_acc", "val/robust_acc", "val/robust_acc_fgsm"):
        assert apart[name] == pytest.approx(together[name], abs=1e-6)


# --- when it runs ---------------------------------------------------------------------------------------------------


class Epochs(pl.Callback):
    """In which epochs was the evaluation fresh?"""

    def __init__(self) -> None:
        self.fresh: list[int] = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking and "val/robust_acc" in trainer.logged_metrics:
            self.fresh.append(trainer.current_epoch)


def logged(logger: RecordingLogger, name: str) -> list[float]:
    return [metrics[name] for _, metrics in logger.all if name in metrics]


class Everything(RecordingLogger):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def log_metrics(self, metrics, step=None):
        self.all.append((step, dict(metrics)))


def run(*callbacks, module=None, **settings):
    logger = Everything()
    trainer = make_trainer(pl.Trainer, *callbacks, logger=logger, **settings)
    trainer.fit(Linear() if module is None else module, **CASES["tuple"].data())
    return trainer, logger


@pytest.mark.parametrize(("every", "epochs", "count"), [(1, 3, 3), (2, 5, 3), (3, 5, 2), (9, 4, 1)])
def test_every_n_epochs_and_the_last(every, epochs, count):
    trainer, logger = run(RobustEvaluation(FIXED, THREAT, every_n_epochs=every), max_epochs=epochs)
    assert len(logged(logger, "val/robust_acc")) == count
    assert "val/robust_acc" in trainer.callback_metrics


def test_the_sanity_check_logs_nothing_but_finds_mistakes():
    trainer, logger = run(RobustEvaluation(FIXED, THREAT), max_epochs=1, limit_train_batches=0)
    assert not logged(logger, "val/robust_acc")
    with pytest.raises(ValueError, match="threat.mean"):
        run(RobustEvaluation(FIXED, Threat(low=0.5)), max_epochs=1, limit_train_batches=0)


def test_limit_batches():
    x, y = image_columns(60, seed=1)
    found = validate(RobustEvaluation(FIXED, THREAT, limit_batches=2))
    first = validate(RobustEvaluation(FIXED, THREAT), loaders=loader(x[:16], y[:16]))
    assert {k: v for k, v in found.items() if k != "val_loss"} == {k: v for k, v in first.items() if k != "val_loss"}


def test_predict_is_left_alone():
    trainer = make_trainer(pl.Trainer, RobustEvaluation(FIXED, THREAT))
    x, y = image_columns(8)
    module = Linear()
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    (out,) = trainer.predict(module, loader(x, y))
    assert torch.equal(out, module(x))


# --- with the rest of Lightning -------------------------------------------------------------------------------------


def test_as_the_monitor_of_checkpoints_and_early_stopping(tmp_path):
    for ours_first in (True, False):
        saver = ModelCheckpoint(tmp_path, monitor="val/robust_acc", mode="max", filename="{epoch}", save_top_k=-1)
        stopper = EarlyStopping("val/robust_acc", mode="max", patience=1, min_delta=2.0)
        evaluation = RobustEvaluation(FIXED, THREAT)
        order = [evaluation, saver, stopper] if ours_first else [saver, stopper, evaluation]
        _, logger = run(*order, max_epochs=5, enable_checkpointing=True)
        values = logged(logger, "val/robust_acc")
        assert len(values) == 2  # stopped: nothing improves by 2
        assert float(saver.best_model_score) == pytest.approx(max(values))


def test_the_model_is_left_as_it_was_in_inference_mode():
    module = CASES["nasty"].module()
    before = portrait(module)
    for inference_mode in (True, False):
        validate(RobustEvaluation(FIXED, THREAT), module=module, inference_mode=inference_mode)
    module.train()
    assert_same(before, portrait(module))


def test_the_users_metrics_are_not_touched():
    plain, ours = validate(), validate(RobustEvaluation(FIXED, THREAT))
    assert ours["val_loss"] == plain["val_loss"]


def test_two_evaluations_need_two_names():
    big, small = Threat(eps=0.3), Threat(eps=0.05)
    found = validate(RobustEvaluation(FIXED, big, name="big"), RobustEvaluation(FIXED, small, name="small"))
    assert found["val/big/robust_acc"] < found["val/small/robust_acc"]
    with pytest.raises(ValueError, match="name"):
        validate(RobustEvaluation(FIXED, big), RobustEvaluation(FIXED, small))


def test_lightning_pytorch():
    case = CASES["unified"]
    trainer = make_trainer(unified.Trainer, RobustEvaluation(FIXED, THREAT), max_epochs=1)
    trainer.fit(case.module(), **case.data())
    assert "val/robust_acc" in trainer.callback_metrics


def test_checkpoints_hold_plain_settings(tmp_path):
    trainer, _ = run(RobustEvaluation(FIXED, THREAT), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    states = torch.load(tmp_path / "model.ckpt", weights_only=True)["callbacks"]
    (state,) = [v for k, v in states.items() if "RobustEvaluation" in k]
    assert state["settings"]["threat"]["eps"] == EPS


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reduced_precision(precision):
    data = None
    if precision == "bf16-true":
        x, y = image_columns(60, seed=1)
        data = loader(x.bfloat16(), y)
    found = validate(RobustEvaluation(FIXED, THREAT), precision=precision, loaders=data)
    full = validate(RobustEvaluation(FIXED, THREAT))
    assert found["val/robust_acc"] == pytest.approx(full["val/robust_acc"], abs=0.1)


def test_a_failure_leaves_the_module_usable():
    class Breaks(Linear):
        calls: ClassVar[list[int]] = []

        def validation_step(self, batch, batch_idx):
            Breaks.calls.append(1)
            if len(Breaks.calls) == 4:
                raise RuntimeError("the user's step broke")
            super().validation_step(batch, batch_idx)

    module = Breaks()
    with pytest.raises(RuntimeError, match="broke"):
        validate(RobustEvaluation(FIXED, THREAT), module=module)
    assert "log" not in vars(module)
    assert all(p.requires_grad for p in module.parameters())
    assert "val/robust_acc" in validate(RobustEvaluation(FIXED, THREAT), module=module)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attacks": {}}, ValueError, "at least one"),
        ({"attacks": {"a": "pgd"}}, TypeError, "attacks.a"),
        ({"attacks": {"n": FGSM(noise=2, project=False)}}, ValueError, "factor of 3"),
        ({"threat": 0.1}, TypeError, "threat"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs"),
        ({"limit_batches": 1.5}, ValueError, "limit_batches"),
        ({"every_n_epochs": True}, ValueError, "every_n_epochs"),
    ],
)
def test_settings_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        RobustEvaluation(**{"attacks": PGD(), "threat": THREAT, **arguments})


def test_a_task_without_classes_has_no_logits():
    case = CASES["regression"]
    with pytest.raises(ValueError, match="logits="):
        fit(case, RobustEvaluation(PGD(targeted="next"), case.ball(EPS)))
