"""Attacks that grow at the model's own pace, and settings of schedules that are reached from yaml."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, make_trainer, portrait, seed_all
from pytorch_lightning.callbacks import ModelCheckpoint

from robust_train import FGSM, PGD, AdversarialTraining, CurriculumTraining, Threat, recipe

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "nasty", "manual_accumulation", "skips_batches", "unified"]


class Scripted(CurriculumTraining):
    """Whose model makes progress in the epochs that the test says."""

    accuracies = (0.1, 0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5)

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self._kept.judged = lambda trainer, *rest: {"now": self.accuracies[trainer.current_epoch]}


def steps_by_epoch(callback, epochs, **settings):
    seen = []

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(int(trainer.callback_metrics["train/attack_steps"]))

    fit(CASES["tuple"], callback, Looks(), max_epochs=epochs, limit_val_batches=0, **settings)
    return seen


def test_a_step_is_gained_where_there_is_no_more_progress():
    assert steps_by_epoch(Scripted(PGD(steps=2), Threat(eps=0.1), patience=2), 8) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert steps_by_epoch(Scripted(PGD(steps=9), Threat(eps=0.1), patience=1), 8) == [1, 1, 1, 2, 2, 2, 3, 3]


def test_batches_are_attacked_with_as_many_steps():
    used = []

    class Counting(PGD):
        def perturb(self, victim, x, threat, generator):
            used.append(self.steps)
            return super().perturb(victim, x, threat, generator)

    fit(CASES["tuple"], Scripted(Counting(steps=3), Threat(eps=0.1), patience=1), max_epochs=5, limit_val_batches=0)
    assert used == [1] * 9 + [2] * 6


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_unmodified_modules(name):
    case = CASES[name]
    ours = fit(case, CurriculumTraining(PGD(steps=2), case.ball(0.1), patience=1))
    assert "train/curriculum_acc" in ours.trainer.callback_metrics
    nothing = fit(case, CurriculumTraining(PGD(steps=2), case.ball(0), patience=1))
    theirs = {k: v for k, v in nothing.trace["metrics"].items() if "attack_steps" not in k and "curriculum" not in k}
    assert theirs == fit(case).trace["metrics"]
    assert_same(portrait(nothing.module), portrait(fit(case).module))


def test_a_run_that_is_resumed_goes_on_where_it_stood(tmp_path):
    def run(epochs, folder, ckpt_path=None):
        seed_all(0)
        module = TupleBatch()
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        settings = {"max_epochs": epochs, "enable_checkpointing": True, "limit_val_batches": 0}
        callback = Scripted(PGD(steps=3), Threat(eps=0.1), patience=1)
        trainer = make_trainer(pl.Trainer, callback, saver, **settings)
        trainer.fit(module, loader(*image_columns()), ckpt_path=ckpt_path)
        return portrait(dict(module.state_dict()))

    straight = run(5, "straight")
    run(4, "first")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        assert_same(straight, run(5, "second", tmp_path / "first" / "last.ckpt"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CurriculumTraining(FGSM(), Threat()), "has no steps that could grow; use PGD"),
        (lambda: CurriculumTraining(PGD(), Threat(), patience=0), "curriculum_training.patience"),
        (lambda: CurriculumTraining(PGD(), Threat(), batches=0), "curriculum_training.batches"),
    ],
)
def test_bad_settings_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_schedules_and_targets_are_settings_of_a_recipe():
    where = "callbacks.adversarial_training"
    settings = [f"{where}.warmup_epochs=3", f"{where}.warmup=both", f"{where}.attack.targeted=random"]
    (callback,) = (c for c in recipe("pgd_at", *settings) if isinstance(c, AdversarialTraining))
    attack, threat = callback.schedule(callback.attack, callback.threat, 0, 0)
    assert attack == PGD(steps=2, targeted="random")
    assert threat.radius == pytest.approx(callback.threat.radius / 4)
    (curriculum,) = (c for c in recipe("curriculum", "callbacks.curriculum_training.patience=4") if c.defends)
    assert isinstance(curriculum, CurriculumTraining)
    assert curriculum.patience == 4
