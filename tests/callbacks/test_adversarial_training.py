from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign import batches, optimizing
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import RecordingLogger, assert_same, fit, make_trainer, portrait, seed_all
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from robust_train import (
    FGSM,
    PGD,
    PGDAT,
    TRADES,
    AdversarialTraining,
    Attack,
    RobustEvaluation,
    Threat,
    TorchAttack,
    WorstCase,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
]
EPS = 0.2


def callback(attack=None, eps=EPS, **settings) -> AdversarialTraining:
    return AdversarialTraining(PGD(steps=3) if attack is None else attack, Threat(eps=eps), **settings)


def spying(base=batches.TupleBatch, find=lambda batch: batch[0]):
    """A module that shows each batch it was given: ``calls[batch][call]``, clean inputs in ``clean[batch]``.

    The lists are class attributes, which the callback rightly takes for nobody's state.
    """

    class Spy(base):
        calls: ClassVar[list[list[Any]]] = []
        clean: ClassVar[list[Any]] = []

        def on_train_batch_start(self, batch, batch_idx):
            Spy.calls.append([])
            Spy.clean.append(find(batch).clone())

        def training_step(self, batch, batch_idx):
            Spy.calls[-1].append(find(batch).detach().clone())
            return super().training_step(batch, batch_idx)

    return Spy


class Counting(PGD):
    """Remembers with what it was called."""

    seen: ClassVar[list[tuple[float, int]]] = []

    def perturb(self, victim, x, threat, generator):
        Counting.seen.append((round(threat.radius, 6), self.steps))
        return super().perturb(victim, x, threat, generator)


@pytest.fixture(autouse=True)
def forget():
    Counting.seen.clear()


# --- what the step sees ---------------------------------------------------------------------------------------------


def test_the_users_step_sees_adversarial_examples_inside_the_ball():
    module = spying()()
    fit(CASES["tuple"], callback(), module=module, limit_val_batches=0)
    assert len(module.calls) == 6
    for clean, calls in zip(module.clean, module.calls, strict=True):
        assert len(calls) == 3 + 1
        x_adv = calls[-1]
        assert x_adv.shape == clean.shape
        assert 0.5 * EPS < float((x_adv - clean).abs().max()) <= EPS * (1 + 1e-6)
        assert bool((Threat(eps=EPS).size(x_adv, clean) <= EPS * (1 + 1e-6)).all())
        assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1


def test_the_loss_of_what_it_sees_is_higher():
    module = spying()()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    x, y = image_columns()
    fit(CASES["tuple"], callback(PGD(steps=5)), module=module, data={"train_dataloaders": loader(x, y)}, max_epochs=1)
    module.eval()
    for i, (clean, calls) in enumerate(zip(module.clean, module.calls, strict=True)):
        labels = y[8 * i : 8 * i + len(clean)]
        assert F.cross_entropy(module(calls[-1]), labels) > F.cross_entropy(module(clean), labels) + 0.1


@pytest.mark.parametrize("objective", [PGDAT(), PGDAT(clean_weight=0.5), TRADES()])
@pytest.mark.parametrize("module", [batches.TupleBatch, batches.MutatesBatch])
def test_batches_that_are_views_of_the_data_set_never_change(module, objective):
    x, y = image_columns()
    before = x.clone()
    named = module is batches.MutatesBatch

    def views(i):
        part = slice(i, i + 5)
        return {"x": x[part].clone() if named else x[part], "y": y[part]} if named else (x[part], y[part])

    data = torch.utils.data.DataLoader([views(i) for i in range(0, 20, 5)], batch_size=None)
    fit(CASES["tuple"], callback(objective=objective), module=module(), data={"train_dataloaders": data}, max_epochs=1)
    assert torch.equal(x, before)


def test_validation_is_left_alone():
    seen = []

    class Module(batches.TupleBatch):
        def validation_step(self, batch, batch_idx):
            seen.append(batch[0].clone())

    fit(CASES["tuple"], callback(), module=Module(), max_epochs=1, num_sanity_val_steps=0)
    assert torch.equal(torch.cat(seen), image_columns(n=12, seed=1)[0])


@pytest.mark.parametrize(
    ("make_batch", "inputs", "changed"),
    [
        (lambda a, b, y: (a, b, y), None, 0),
        (lambda a, b, y: (a, b, y), 1, 1),
        (lambda a, b, y: [a, b, y], -2, 1),
        (lambda a, b, y: (y, a, b), None, 1),
        (lambda a, b, y: {"a": a, "image": b, "y": y}, None, "image"),
        (lambda a, b, y: {"a": a, "image": b, "y": y}, "a", "a"),
        (lambda a, b, y: SimpleNamespace(first=a, second=b, y=y), "second", "second"),
        (lambda a, b, y: {"views": [a, b], "y": y}, "views.1", "views.1"),
        (lambda a, b, y: ({"views": (a, b)}, {"y": y}), "0.views.0", "0.views.0"),
        (lambda a, b, y: batches.Pair(y, a), "inputs", 1),
        (lambda a, b, y: batches.Pair(y, a), 1, 1),
        (lambda a, b, y: {"a.b": a, "y": y}, "a.b", "a.b"),
    ],
)
def test_the_named_input_and_nothing_else_is_attacked(make_batch, inputs, changed):
    from robust_train.callbacks._batch import _tensors

    seen = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch):
            tensors = {".".join(map(str, path)): t for path, t in _tensors(batch)}
            floats = [t for t in tensors.values() if t.is_floating_point()]
            (y,) = [t for t in tensors.values() if not t.is_floating_point()]
            seen.append({path: t.detach().clone() for path, t in tensors.items()})
            return F.cross_entropy(self.net(sum(floats)), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    a, b, y = torch.rand(6, 4), torch.rand(6, 4), torch.arange(6) % 3
    data = torch.utils.data.DataLoader([make_batch(a, b, y)], batch_size=None, collate_fn=lambda batch: batch)
    clean = {".".join(map(str, path)): t.clone() for path, t in _tensors(make_batch(a, b, y))}
    make_trainer(pl.Trainer, callback(inputs=inputs), max_epochs=1).fit(Module(), data)
    differing = [path for path, t in seen[-1].items() if not torch.equal(t, clean[path])]
    expected = str(changed) if not isinstance(make_batch(a, b, y), batches.Pair) else batches.Pair._fields[changed]
    assert differing == [expected]


def test_a_wrong_name_lists_the_places_that_there_are():
    with pytest.raises(ValueError, match="inputs='pixels'.*image"):
        fit(CASES["dict"], callback(inputs="pixels"))


# --- everything comes back ------------------------------------------------------------------------------------------


class Bang(Exception):
    pass


def breaking(error: type[BaseException], at: int):
    """Raises in its n-th call of all, extra calls included."""

    class Breaks(batches.TupleBatch):
        calls: ClassVar[list[int]] = []

        def __init__(self):
            super().__init__()
            self.net[0].weight.requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[1].eval()

        def training_step(self, batch, batch_idx):
            Breaks.calls.append(1)
            if len(Breaks.calls) == at:
                raise error("the user's step broke")
            return super().training_step(batch, batch_idx)

    return Breaks


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
@pytest.mark.parametrize("at", [2, 4, 7], ids=["in an attack", "in the step itself", "later"])
@pytest.mark.parametrize("error", [Bang, KeyboardInterrupt])
def test_the_module_is_as_before_after_a_failure(error, at, mode):
    def after(*callbacks, at):
        torch.manual_seed(0)
        module = breaking(error, at)()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
        with pytest.raises((error, SystemExit)):
            fit(CASES["tuple"], *callbacks, module=module, limit_val_batches=0)
        return module

    plain, ours = after(at=(at - 1) // 4 + 1), after(callback(mode=mode, eps=0), at=at)
    assert "training_step" not in vars(ours)
    assert vars(ours).keys() == vars(plain).keys()
    flags = [[(p.requires_grad, p.grad is None) for p in m.parameters()] for m in (plain, ours)]
    assert flags[0] == flags[1]
    assert [m.training for m in ours.modules()] == [m.training for m in plain.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())
    assert_same(portrait(plain), portrait(ours))


def test_the_loggers_of_the_trainer_come_back_after_a_failure():
    logger = RecordingLogger()
    trainer = make_trainer(pl.Trainer, callback(), logger=logger)
    with pytest.raises(Bang):
        trainer.fit(breaking(Bang, 2)(), **CASES["tuple"].data())
    assert trainer.loggers == [logger]


def test_a_training_step_of_the_instance_is_kept():
    module = batches.TupleBatch()
    original = module.training_step
    module.training_step = own = lambda batch, batch_idx: original(batch, batch_idx) * 2
    fit(CASES["tuple"], callback(), module=module, max_epochs=1)
    assert module.training_step is own


def test_after_the_fit_the_step_is_the_classs_own():
    module = fit(CASES["tuple"], callback()).module
    assert "training_step" not in vars(module)
    assert "log" not in vars(module)
    assert all(p.requires_grad for p in module.parameters())


# --- optimization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["second_order", "manual_closure"])
def test_closures_find_the_same_adversarial_examples_each_time(name):
    module = spying(CASES[name].module)()
    fit(CASES[name], callback(Counting(steps=2)), module=module, limit_val_batches=0)
    assert len(Counting.seen) == 6
    for calls in module.calls:
        assert all(torch.equal(x, calls[-1]) for x in calls[2:])


@pytest.mark.parametrize("name", ["gan", "manual_accumulation", "manual_skips"])
def test_manual_optimization_trains_on_adversarial_examples(name):
    module = spying(CASES[name].module)
    if name == "gan":

        class module(optimizing.GAN):  # noqa: N801  (its step takes no batch_idx)
            calls: ClassVar[list[Any]] = []
            clean: ClassVar[list[Any]] = []

            def on_train_batch_start(self, batch, batch_idx):
                module.calls.append([])
                module.clean.append(batch[0].clone())

            def training_step(self, batch):
                module.calls[-1].append(batch[0].detach().clone())
                return super().training_step(batch)

    module = module()
    steps = fit(CASES[name]).trainer.global_step
    result = fit(CASES[name], callback(), module=module)
    assert result.trainer.global_step == steps > 0
    moved = [not torch.equal(calls[-1], clean) for clean, calls in zip(module.clean, module.calls, strict=True)]
    assert moved == ([True, False, True] * 2 if name == "manual_skips" else [True] * 6)


def test_a_step_that_calls_backward_itself_is_refused():
    class Module(optimizing.ManualSkips):
        def training_step(self, batch, batch_idx):
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.optimizers().step()

    with pytest.raises(ValueError, match="manual_backward"):
        fit(CASES["tuple"], callback(), module=Module())


def test_the_mix_of_clean_and_adversarial_loss():
    module = spying()()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    x, y = image_columns(n=8)
    data = {"train_dataloaders": loader(x, y)}
    result = fit(CASES["tuple"], callback(objective=PGDAT(clean_weight=0.3)), module=module, data=data, max_epochs=1)
    *_, x_adv, clean = module.calls[0]
    assert torch.equal(clean, x)
    with torch.no_grad():
        expected = 0.7 * F.cross_entropy(module(x_adv), y) + 0.3 * F.cross_entropy(module(x), y)
    torch.testing.assert_close(result.trainer.callback_metrics["train/adv_loss"], expected)


def test_trades_trains_on_clean_inputs_plus_the_divergence():
    module = spying()()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    x, y = image_columns(n=8)
    data = {"train_dataloaders": loader(x, y)}
    result = fit(CASES["tuple"], callback(objective=TRADES(beta=4)), module=module, data=data, max_epochs=1)
    *_, clean, x_adv = module.calls[0]
    assert torch.equal(clean, x)
    with torch.no_grad():
        p, q = module(x).softmax(1), module(x_adv).softmax(1)
        expected = F.cross_entropy(module(x), y) + 4 * (p * (p / q).log()).sum(1).mean()
    assert float((p - q).abs().max()) > 0.01
    torch.testing.assert_close(result.trainer.callback_metrics["train/adv_loss"], expected)


# --- attacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(step=1.25, noise=1),
        FGSM(noise=2, project=False),
        PGD(steps=2, restarts=2),
        PGD(steps=2, targeted="least_likely"),
        PGD(steps=2, targeted="random"),
        WorstCase([PGD(steps=1), FGSM()]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("objective", [PGDAT(), TRADES()], ids=["pgd_at", "trades"])
def test_other_attacks(attack, objective):
    if isinstance(objective, TRADES) and getattr(attack, "targeted", None):
        pytest.skip("a divergence has no target")
    module = spying()()
    fit(CASES["tuple"], callback(attack, objective=objective), module=module, max_epochs=1)
    assert all(not torch.equal(calls[-1], clean) for clean, calls in zip(module.clean, module.calls, strict=True))


def test_an_attack_of_ones_own_need_not_be_a_dataclass():
    class Darker(Attack):
        def perturb(self, victim, x, threat, generator):
            return x - threat.radius

    module = spying()()
    fit(CASES["tuple"], callback(Darker()), module=module, max_epochs=1)
    assert torch.equal(module.calls[0][-1], Threat(eps=EPS).enclose(module.clean[0] - EPS, module.clean[0]))


@pytest.mark.parametrize("name", ["tuple", "dict", "tabular_binary", "encoder_and_head", "manual_accumulation"])
def test_attacks_of_another_library(name):
    pytest.importorskip("torchattacks")
    case = dataclasses.replace(CASES[name], threat={"low": -9.0, "high": 9.0} if "tabular" in name else {})
    attack = TorchAttack("PGD", {"steps": 2})
    plain, ours = fit(case, max_epochs=1), fit(case, AdversarialTraining(attack, case.ball(EPS)), max_epochs=1)
    assert portrait(plain.module.state_dict()) != portrait(ours.module.state_dict())
    nothing = fit(case, AdversarialTraining(attack, case.ball(0)), max_epochs=1)
    assert_same(plain.trace, nothing.trace)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attack": "pgd"}, TypeError, "attack"),
        ({"threat": 8 / 255}, TypeError, "threat"),
        ({"objective": "trades"}, TypeError, "objective"),
        ({"mode": "test"}, ValueError, "mode.*eval, batch, train"),
        ({"warmup": "lr"}, ValueError, "warmup.*eps, steps, both"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs"),
        ({"objective": TRADES(), "attack": PGD(random_start=False)}, ValueError, "random_start=true"),
        ({"objective": TRADES(), "attack": FGSM()}, ValueError, "noise=1"),
    ],
)
def test_settings_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        AdversarialTraining(**{"attack": PGD(), "threat": Threat(), **arguments})


class Mine(AdversarialTraining):
    pass


@pytest.mark.parametrize("other", [AdversarialTraining, Mine])
def test_two_of_them_are_refused(other):
    with pytest.raises(ValueError, match="WorstCase"):
        fit(CASES["tuple"], callback(), other(PGD(), Threat()))


def test_bytes_are_refused():
    x, y = image_columns()
    with pytest.raises(TypeError, match="uint8.*image.float"):
        fit(CASES["tuple"], callback(), data={"train_dataloaders": loader((x * 255).byte(), y)})


@pytest.mark.parametrize(
    ("change", "message"), [(lambda x: (x - 0.3) / 0.2, "threat.mean"), (lambda x: x * 255, "threat.high=255")]
)
def test_inputs_in_other_units_are_refused_before_anything_is_trained(change, message):
    x, y = image_columns()
    module = batches.TupleBatch()
    before = portrait(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(CASES["tuple"], callback(), module=module, data={"train_dataloaders": loader(change(x), y)})
    assert portrait(module.state_dict()) == before


def test_normalised_inputs_are_attacked_in_pixels():
    x, y = image_columns()
    module = spying()()
    threat = Threat(eps=0.1, mean=0.3, std=0.2)
    data = {"train_dataloaders": loader((x - 0.3) / 0.2, y)}
    fit(CASES["tuple"], AdversarialTraining(PGD(steps=3), threat), module=module, data=data)
    moved = [(calls[-1] - clean).abs().max() for clean, calls in zip(module.clean, module.calls, strict=True)]
    assert float(max(moved)) == pytest.approx(0.1 / 0.2, rel=1e-4)


def test_a_step_that_fetches_its_own_batches_is_refused():
    class Module(batches.TupleBatch):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="dataloader_iter"):
        fit(CASES["tuple"], callback(), module=Module())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"])
@pytest.mark.parametrize("package", [pl, unified])
def test_strategies_that_were_never_proven_are_refused(name, package):
    base = package.strategies.SingleDeviceStrategy
    strategy = type("Mine", (type(name, (base,), {}),), {})("cpu")
    module = CASES["unified"].module() if package is unified else batches.TupleBatch()
    trainer = make_trainer(package.Trainer, callback(), strategy=strategy, accelerator="auto")
    with pytest.raises(ValueError, match=f"strategy {name}"):
        trainer.fit(module, **CASES["tuple"].data())


@pytest.mark.parametrize("name", ["regression", "gan"])
@pytest.mark.parametrize(("attack", "objective"), [(PGD(), TRADES()), (PGD(targeted="next"), PGDAT())])
def test_a_task_without_classes_has_no_logits(name, attack, objective):
    case = CASES[name]
    with pytest.raises(ValueError, match="logits="):
        fit(case, AdversarialTraining(attack, case.ball(EPS), objective))


def test_a_wrong_name_of_the_logits_lists_the_children():
    with pytest.raises(ValueError, match="logits='head'.*net"):
        fit(CASES["tuple"], callback(objective=TRADES(), logits="head"))


def test_the_logits_may_be_named():
    case = CASES["encoder_and_head"]
    found = fit(case, callback(objective=TRADES())).module.state_dict()
    named = fit(case, callback(objective=TRADES(), logits="head")).module.state_dict()
    assert_same(portrait(dict(found)), portrait(dict(named)))


def test_an_input_that_the_loss_does_not_use_is_refused():
    class Module(batches.TupleBatch):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].detach(), batch[1]), batch_idx)

    with pytest.raises(ValueError, match="does not depend on the attacked input"):
        fit(CASES["tuple"], callback(), module=Module())


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        ("eps", [(0.1, 6), (0.2, 6), (0.3, 6), (0.3, 6)]),
        ("steps", [(0.3, 2), (0.3, 4), (0.3, 6), (0.3, 6)]),
        ("both", [(0.1, 2), (0.2, 4), (0.3, 6), (0.3, 6)]),
    ],
)
def test_the_warm_up(warmup, expected):
    attack = Counting(steps=6)
    fit(
        CASES["tuple"],
        callback(attack, eps=0.3, warmup_epochs=2, warmup=warmup),
        max_epochs=4,
        limit_train_batches=1,
    )
    assert Counting.seen == expected


def test_a_schedule_of_ones_own():
    class Alternating(AdversarialTraining):
        def schedule(self, attack, threat, epoch, step):
            return attack, threat.scaled(step % 2)

    module = spying()()
    fit(CASES["tuple"], Alternating(Counting(steps=1), Threat(eps=EPS)), module=module, max_epochs=1)
    assert [eps for eps, _ in Counting.seen] == [0, EPS, 0]
    assert torch.equal(module.calls[0][-1], module.clean[0])


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_plain_and_holds_the_users_keys_only(tmp_path):
    plain, ours = fit(CASES["nasty"]), fit(CASES["nasty"], callback(WorstCase({"a": PGD(steps=1), "b": FGSM()})))
    for result, name in ((plain, "plain"), (ours, "ours")):
        result.trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    loaded = {name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "ours")}
    assert loaded["ours"]["state_dict"].keys() == loaded["plain"]["state_dict"].keys()
    (state,) = [v for k, v in loaded["ours"]["callbacks"].items() if "AdversarialTraining" in k]

    def plain_builtins(value):
        if isinstance(value, dict):
            return all(type(k) is str and plain_builtins(v) for k, v in value.items())
        return (
            all(map(plain_builtins, value))
            if type(value) is list
            else type(value) in (int, float, str, bool, type(None))
        )

    assert plain_builtins(state)
    assert state["settings"]["threat"]["eps"] == EPS


class Resumable:
    """Batches in order; knows where it stands, as Lightning asks for a resume inside an epoch."""

    def __init__(self, done: int = 0) -> None:
        self.done = done
        x, y = image_columns(40)
        self.batches = [(x[i : i + 8].clone(), y[i : i + 8]) for i in range(0, 40, 8)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches[self.done :]:
            self.done += 1
            yield batch
        self.done = 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Crash(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            raise Bang


@pytest.mark.parametrize("at", [5, 7], ids=["between epochs", "inside an epoch"])
@pytest.mark.parametrize("objective", [PGDAT(), TRADES()], ids=["pgd_at", "trades"])
def test_an_interrupted_run_ends_where_the_straight_one_does(at, objective, tmp_path):
    def run(seed, *callbacks, ckpt_path=None):
        seed_all(0)
        module = batches.TupleBatch()
        seed_all(seed)
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        settings = {"max_epochs": 3, "enable_checkpointing": True, "limit_val_batches": 0}
        trainer = make_trainer(pl.Trainer, callback(objective=objective), saver, *callbacks, **settings)
        trainer.fit(module, Resumable(), ckpt_path=ckpt_path)
        return portrait(dict(module.state_dict()))

    straight = run(0)
    with pytest.raises(Bang):
        run(0, Crash(at + 1))
    # another process would have another seed: the attack's own comes from the checkpoint
    assert_same(straight, run(1, ckpt_path=tmp_path / f"step={at}.ckpt"))


# --- the rest of the Trainer ----------------------------------------------------------------------------------------


def test_settings_reach_the_logger():
    settings = fit(CASES["tuple"], callback(mode="batch"), max_epochs=1).logger.hyperparams
    assert settings["robust_train/AdversarialTraining"]["attack"]["steps"] == 3
    assert settings["robust_train/AdversarialTraining"]["mode"] == "batch"


def test_real_loggers_take_the_settings(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = make_trainer(
        pl.Trainer, callback(), RobustEvaluation(PGD(steps=1), Threat()), logger=logger, max_epochs=1
    )
    trainer.fit(batches.TupleBatch(), **CASES["tuple"].data())
    assert "AdversarialTraining" in next(tmp_path.rglob("hparams.yaml")).read_text()
    assert "train/adv_loss" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_the_same_callback_twice_is_like_two_fresh_ones():
    same = callback()
    first, second = fit(CASES["tuple"], same, seed=1), fit(CASES["tuple"], same, seed=2)
    assert_same(fit(CASES["tuple"], callback(), seed=1).trace, first.trace)
    assert_same(fit(CASES["tuple"], callback(), seed=2).trace, second.trace)


def test_the_seed_decides_the_random_starts():
    def weights(seed, run_seed):
        torch.manual_seed(0)
        module = batches.TupleBatch()
        x, y = image_columns()
        data = {"train_dataloaders": loader(x, y)}
        return portrait(
            dict(fit(CASES["tuple"], callback(seed=seed), module=module, data=data, seed=run_seed).module.state_dict())
        )

    assert weights(3, 0) == weights(3, 1)
    assert weights(3, 0) != weights(4, 0)
    assert weights(None, 0) == weights(None, 0)
    assert weights(None, 0) != weights(None, 1)


def test_fast_dev_run():
    trainer = make_trainer(pl.Trainer, callback(), fast_dev_run=True)
    trainer.fit(batches.TupleBatch(), **CASES["tuple"].data())
    assert trainer.global_step == 1


def test_weight_averaging_stands_before_or_after():
    def weights(*order):
        return portrait(dict(fit(CASES["tuple"], *order).module.state_dict()))

    def averaging():
        return EMAWeightAveraging(decay=0.5)

    assert_same(weights(averaging(), callback()), weights(callback(), averaging()))
    assert_same(weights(averaging()), weights(averaging(), callback(eps=0)))
    assert_same(weights(averaging()), weights(callback(eps=0), averaging()))


@pytest.mark.parametrize("name", ["tuple", "unified"])
def test_both_lightning_packages(name):
    module = fit(CASES[name], callback(), RobustEvaluation(PGD(steps=1), Threat(eps=EPS))).module
    assert "training_step" not in vars(module)
    assert isinstance(callback(), pl.Callback)
    assert isinstance(callback(), unified.Callback)


def test_other_callbacks_see_the_clean_batch():
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch[0])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert batch[0] is seen[-1]

    module = spying()()
    fit(CASES["tuple"], Looks(), callback(), module=module)
    assert all(torch.equal(a, b) for a, b in zip(seen, module.clean, strict=True))
