"""Catastrophic overfitting is found and repaired; robust overfitting is logged, and the best epoch is kept."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, make_trainer, portrait, seed_all
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from robust_train import (
    AWP,
    DPSGD,
    FGSM,
    PGD,
    TRADES,
    AdversarialTraining,
    CatastrophicOverfitting,
    ClassifierVictim,
    CurriculumTraining,
    HelperTraining,
    RobustEvaluation,
    RobustOverfitting,
    Threat,
)
from robust_train.callbacks.catastrophic_overfitting import has_overfitted
from robust_train.evasion.evaluate import judge
from robust_train.starter import Classifier, Digits, SmallCNN

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "nasty", "manual_accumulation", "manual_closure", "skips_batches", "segmentation", "unified"]
SETTINGS = {"accumulate": {"accumulate_grad_batches": 3}, "bf16": {"precision": "bf16-mixed"}}


def attacked(case, eps=0.1):
    return AdversarialTraining(PGD(steps=2), case.ball(eps), **case.where)


def watches(case):
    judge = RobustEvaluation(PGD(steps=2), case.ball(0.1), **case.where)
    return [CatastrophicOverfitting(PGD(steps=2), gap=0.9), judge, RobustOverfitting(batches=2)]


@pytest.mark.parametrize("name", KINDS)
def test_watching_changes_nothing(name):
    case = CASES[name]
    plain = fit(case, attacked(case))
    watched = fit(case, attacked(case), *watches(case))
    assert_same(plain.trace, watched.trace)
    metrics = watched.trainer.callback_metrics
    assert {"train/own_attack_acc", "train/multi_step_acc", "train/robust_acc", "train/robust_gap"} <= set(metrics)
    gap = metrics["train/robust_acc"] - metrics["val/robust_acc"]
    assert float(metrics["train/robust_gap"]) == pytest.approx(float(gap), abs=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_watching_changes_nothing_in_other_trainers(settings):
    case = CASES["nasty"]
    plain = fit(case, attacked(case), **SETTINGS[settings])
    assert_same(plain.trace, fit(case, attacked(case), *watches(case), **SETTINGS[settings]).trace)


def test_the_numbers_are_those_of_the_attacks_on_the_first_batches():
    case, module = CASES["tuple"], TupleBatch()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    x, y = image_columns()
    data = {"train_dataloaders": loader(x, y)}
    callbacks = [AdversarialTraining(FGSM(), case.ball(0.1)), CatastrophicOverfitting(PGD(steps=5), batches=2, gap=0.9)]
    metrics = fit(case, *callbacks, module=module, data=data, max_epochs=1).trainer.callback_metrics
    module.eval()
    counts = {"own": 0.0, "strong": 0.0}
    for i in (0, 1):
        part, labels = x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]
        victim = ClassifierVictim(module, labels, stop_when_fooled=True)
        found = judge(victim, part, case.ball(0.1), {"own": FGSM(), "strong": PGD(steps=5)}, 0, 0, 0, i)
        counts = {k: counts[k] + float(found.attacked[k].sum()) for k in counts}
    assert float(metrics["train/own_attack_acc"]) == pytest.approx(counts["own"] / 16)
    assert float(metrics["train/multi_step_acc"]) == pytest.approx(counts["strong"] / 16)


@pytest.mark.parametrize(
    ("trained", "strong", "found"),
    [(0.9, 0.02, True), (0.3, 0.05, True), (0.9, 0.5, False), (0.2, 0.01, False), (0.5, 0.9, False)],
)
def test_what_counts_as_overfitted(trained, strong, found):
    assert has_overfitted(trained, strong, 0.2) is found


def one_step_run(*callbacks, attack=None, epochs=12):
    """One gradient step without a random start, within a ball that is too large for it."""
    pl.seed_everything(0, verbose=False)
    threat = Threat(eps=0.3)
    judge = RobustEvaluation(PGD(steps=10), threat, every_n_epochs=epochs)
    trainer = make_trainer(
        pl.Trainer, AdversarialTraining(attack or FGSM(), threat), judge, *callbacks, max_epochs=epochs
    )
    trainer.fit(Classifier(SmallCNN(channels=8), lr=1e-2), Digits())
    return trainer


def test_one_warning_says_what_to_do():
    with pytest.warns(UserWarning, match="GradAlign.*repair=True") as said:
        trainer = one_step_run(CatastrophicOverfitting(), epochs=5)
    assert sum("CatastrophicOverfitting" in str(w.message) for w in said) == 1
    metrics = trainer.callback_metrics
    assert has_overfitted(float(metrics["train/own_attack_acc"]), float(metrics["train/multi_step_acc"]), 0.2)
    assert float(metrics["val/robust_acc"]) < 0.25


@pytest.mark.slow
def test_repaired_it_goes_on_with_several_steps():
    callback = CatastrophicOverfitting(PGD(steps=5), repair=True)
    with pytest.warns(UserWarning, match=r"trained with PGD\(steps=5\) from here on"):
        trainer = one_step_run(callback)
    assert float(trainer.callback_metrics["val/robust_acc"]) > 0.3
    assert callback.state()["epoch"] is not None


def test_sound_training_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CatastrophicOverfitting")
        one_step_run(CatastrophicOverfitting(), attack=PGD(steps=3), epochs=3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_repaired_run_that_is_resumed_stays_repaired(tmp_path):
    seen = []

    class Counting(PGD):
        def perturb(self, victim, x, threat, generator):
            seen.append(self.steps)
            return super().perturb(victim, x, threat, generator)

    class Found(CatastrophicOverfitting):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if self._epoch is None and trainer.current_epoch == 0:
                self._epoch = 0
                with pytest.warns(UserWarning, match="from here on"):
                    self._tell(self._training, self._training.attack, {"own": 0.9, "strong": 0.0})

    def run(epochs, folder, ckpt_path=None):
        seed_all(0)
        module = TupleBatch()
        watch = Found(Counting(steps=4), gap=0.9, repair=True)
        training = AdversarialTraining(Counting(steps=1), Threat(eps=0.1))
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        settings = {"max_epochs": epochs, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = make_trainer(pl.Trainer, training, watch, saver, **settings)
        trainer.fit(module, loader(*image_columns()), ckpt_path=ckpt_path)
        return portrait(dict(module.state_dict()))

    straight = run(3, "straight")
    seen.clear()
    run(1, "first")
    assert set(seen[:3]) == {1}
    seen.clear()
    assert_same(straight, run(3, "second", tmp_path / "first" / "last.ckpt"))
    assert set(seen) == {4}


# --- robust overfitting ---------------------------------------------------------------------------------------------


class Scripted(RobustEvaluation):
    """Reports a robust accuracy that rises and then falls, whatever the model does."""

    values = (0.2, 0.5, 0.4, 0.3, 0.1, 0.0)

    def _log(self, trainer, module, prefix):
        if not trainer.sanity_checking:
            module.log("val/robust_acc", self.values[trainer.current_epoch])


def test_the_most_robust_epoch_is_kept_and_training_stops(tmp_path):
    threat = Threat(eps=0.1)
    best = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="val/robust_acc", mode="max", auto_insert_metric_name=False, save_top_k=1
    )
    stop = EarlyStopping("val/robust_acc", mode="max", patience=2, check_on_train_epoch_end=False)
    callbacks = [AdversarialTraining(PGD(steps=1), threat), best, stop, Scripted(PGD(steps=1), threat)]
    trainer = make_trainer(pl.Trainer, *callbacks, max_epochs=6, enable_checkpointing=True)
    trainer.fit(TupleBatch(), **CASES["tuple"].data())
    assert trainer.current_epoch == 4
    assert best.best_model_path.endswith("1.ckpt")
    assert float(best.best_model_score) == 0.5


def test_early_stopping_and_the_checkpoint_work_on_the_measured_accuracy(tmp_path):
    threat = Threat(eps=0.1)
    best = ModelCheckpoint(tmp_path, monitor="val/robust_acc", mode="max", auto_insert_metric_name=False)
    stop = EarlyStopping("val/robust_acc", mode="max", patience=1, check_on_train_epoch_end=False)
    judge = RobustEvaluation(PGD(steps=3), threat)
    callbacks = [AdversarialTraining(PGD(steps=2), threat), judge, best, stop, RobustOverfitting()]
    seed_all(0)
    trainer = make_trainer(pl.Trainer, *callbacks, max_epochs=4, enable_checkpointing=True)
    module, data = TupleBatch(), CASES["tuple"].data()
    trainer.fit(module, **data)
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    (found,) = make_trainer(pl.Trainer, judge).validate(module, data["val_dataloaders"], verbose=False)
    assert found["val/robust_acc"] == pytest.approx(float(best.best_model_score))


@pytest.mark.parametrize("first", ["averaging", "evaluation"])
def test_averaged_weights_are_the_ones_that_are_judged(first, tmp_path):
    threat, seen = Threat(eps=0.1), {}

    class Looks(RobustEvaluation):
        def _evaluate(self, trainer, module, batch, *rest):
            seen["judged"] = portrait(dict(module.state_dict()))
            super()._evaluate(trainer, module, batch, *rest)

    class LooksToo(RobustOverfitting):
        def on_validation_batch_start(self, trainer, pl_module, *rest):
            seen["gap"] = portrait(dict(pl_module.state_dict()))
            super().on_validation_batch_start(trainer, pl_module, *rest)

    judge = Looks(PGD(steps=3), threat)
    order = [EMAWeightAveraging(decay=0.8), LooksToo(batches=2), judge]
    order = order if first == "averaging" else order[::-1]
    saver = ModelCheckpoint(tmp_path, save_last=True)
    seed_all(0)
    module = TupleBatch()
    callbacks = [AdversarialTraining(PGD(steps=2), threat), *order, saver]
    trainer = make_trainer(pl.Trainer, *callbacks, enable_checkpointing=True, num_sanity_val_steps=0)
    data = CASES["tuple"].data()
    trainer.fit(module, **data)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(portrait(saved["state_dict"]), seen["judged"])
    assert_same(seen["judged"], seen["gap"])
    assert portrait(saved["current_model_state"]) != seen["judged"]
    in_fit = {k: float(v) for k, v in trainer.callback_metrics.items() if "robust_acc" in k and "train" not in k}
    (after,) = make_trainer(pl.Trainer, judge).validate(module, data["val_dataloaders"], verbose=False)
    assert in_fit == pytest.approx({k: after[k] for k in in_fit})  # the fit ends with the averaged weights


def test_the_gap_is_of_the_epochs_that_were_validated():
    seen = []

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append("train/robust_gap" in trainer.callback_metrics)

    case = CASES["tuple"]
    judge = RobustEvaluation(PGD(steps=1), case.ball(0.1), every_n_epochs=2)
    fit(case, judge, RobustOverfitting(), Looks(), max_epochs=2)
    assert seen == [False, True]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: CatastrophicOverfitting("pgd"), TypeError, "catastrophic_overfitting.attack"),
        (lambda: CatastrophicOverfitting(FGSM(noise=2, project=False)), ValueError, "leaves the ball"),
        (lambda: CatastrophicOverfitting(batches=0), ValueError, "catastrophic_overfitting.batches"),
        (lambda: CatastrophicOverfitting(gap=1), ValueError, r"catastrophic_overfitting.gap must be in \(0, 1\)"),
        (lambda: CatastrophicOverfitting(repair="no"), ValueError, "catastrophic_overfitting.repair"),
        (lambda: RobustOverfitting(batches=True), ValueError, "robust_overfitting.batches"),
        (lambda: RobustOverfitting(name=None), ValueError, "robust_overfitting.name"),
    ],
)
def test_settings_that_cannot_be(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("callbacks", "says"),
    [
        ([CatastrophicOverfitting()], "has none: add one"),
        ([RobustOverfitting(name="l2"), RobustEvaluation(PGD(), Threat())], "whose name is 'l2'"),
        ([AdversarialTraining(PGD(), Threat()), CatastrophicOverfitting(), CatastrophicOverfitting()], "keep one"),
        ([RobustEvaluation(PGD(), Threat()), RobustOverfitting(), RobustOverfitting()], "same metrics"),
    ],
)
def test_what_is_missing_beside_it_is_named(callbacks, says):
    with pytest.raises(ValueError, match=says):
        fit(CASES["tuple"], *callbacks)


PRIVATE = DPSGD(noise_multiplier=1.0, sample_rate=0.5)


@pytest.mark.parametrize(
    "callbacks",
    [
        [AdversarialTraining(PGD(), Threat()), CatastrophicOverfitting(repair=True)],
        [AdversarialTraining(PGD(), Threat(), AWP())],
        [HelperTraining(PGD(), Threat())],
        [CurriculumTraining(PGD(), Threat())],
    ],
    ids=["repair", "awp", "helper", "curriculum"],
)
def test_what_would_make_epsilon_untrue_is_refused(callbacks):
    with pytest.raises(ValueError, match="cannot stand beside DPSGD"):
        make_trainer(pl.Trainer, *callbacks, PRIVATE).fit(TupleBatch(), **CASES["tuple"].data())


def test_a_repair_that_the_objective_cannot_work_with_is_refused_at_once():
    case = CASES["tuple"]
    training = AdversarialTraining(PGD(), case.ball(0.1), TRADES())
    with pytest.raises(ValueError, match="random_start=true"):
        fit(case, training, CatastrophicOverfitting(PGD(random_start=False), repair=True))


def test_a_repair_may_need_logits_that_nobody_needed_before():
    case = CASES["tuple"]
    training = AdversarialTraining(FGSM(), case.ball(0.1))

    class AtOnce(CatastrophicOverfitting):
        def on_train_epoch_end(self, trainer, pl_module):
            training.switch(self.attack)

    fit(case, training, AtOnce(PGD(steps=1, targeted="next"), repair=True))


def test_a_task_without_classes_is_refused_before_anything_is_trained():
    case = CASES["regression"]
    module = case.module()
    before = portrait(dict(module.state_dict()))
    with pytest.raises(ValueError, match="for a task without classes leave CatastrophicOverfitting out"):
        fit(case, AdversarialTraining(PGD(steps=1), case.ball(0.1)), CatastrophicOverfitting(), module=module)
    assert_same(before, portrait(dict(module.state_dict())))
