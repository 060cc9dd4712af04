"""DP-SGD on unmodified modules: that it is exactly what it says."""

from __future__ import annotations

import copy
import json
import math

import pytest
import pytorch_lightning as pl
import torch
from foreign.runs import make_trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from robust_train import DPSGD
from robust_train.callbacks import _seams
from robust_train.privacy.clipping.automatic import Automatic
from robust_train.privacy.clipping.per_layer import PerLayer
from robust_train.privacy.entropy import Entropy

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # of the hooks engine
]
N, BATCH = 40, 8


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs without a logger write their certificate into the working directory


class Net(pl.LightningModule):
    """As a user writes it."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.lr, self.momentum = lr, momentum

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def data(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator))


class Drawn(Dataset):
    """Remembers which examples were asked for."""

    def __init__(self, n: int = N) -> None:
        self.data, self.asked = data(n), []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.data[i]


def loader(n: int = N, **settings) -> DataLoader:
    return DataLoader(data(n), **{"batch_size": BATCH, "shuffle": True, **settings})


def train(*callbacks, module=None, loaders=None, ckpt_path=None, **settings):
    module = Net() if module is None else module
    trainer = make_trainer(pl.Trainer, *callbacks, **{"max_epochs": 2, **settings})
    trainer.fit(module, loader() if loaders is None else loaders, ckpt_path=ckpt_path)
    return module, trainer


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def batches_of(seed: int, steps: int, n: int = N, rate: float = BATCH / N) -> list[list[int]]:
    """What ``unsafe_seed`` makes the sampler draw."""
    entropy = Entropy(seed)
    return [(entropy.uniform(n) < rate).nonzero()[0].tolist() for _ in range(steps)]


def by_hand(seed: int, steps: int, bound: float = math.inf, lr: float = 0.1, momentum: float = 0.0):
    """Per-example gradients one by one, clipped, summed, divided by the expected batch size."""
    module, dataset = Net(), data()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
    for indices in batches_of(seed, steps):
        total = [torch.zeros_like(p) for p in module.parameters()]
        for i in indices:
            x, y = dataset[i]
            grads = torch.autograd.grad(cross_entropy(module.net(x[None]), y[None]), list(module.parameters()))
            norm = torch.stack([g.norm() for g in grads]).norm()
            factor = min(1.0, bound / (float(norm) + 1e-6))
            total = [t + factor * g for t, g in zip(total, grads, strict=True)]
        for p, g in zip(module.parameters(), total, strict=True):
            p.grad = g / BATCH
        optimizer.step()
    return module


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
@pytest.mark.parametrize("engine", ["book_keeping", "hooks"])
@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("bound", [math.inf, 0.3])
def test_without_noise_it_is_plain_sgd_on_poisson_batches(engine, physical, bound):
    callback = DPSGD(
        noise_multiplier=0, max_grad_norm=bound, physical_batch_size=physical, engine=engine, unsafe_seed=5
    )
    module, trainer = train(callback, module=Net(momentum=0.9))
    assert trainer.global_step == 10
    assert torch.allclose(flat(module), flat(by_hand(5, 10, bound, momentum=0.9)), rtol=0, atol=1e-6)
    assert callback.epsilon() == math.inf


@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_equals_opacus_for_the_same_draws(monkeypatch):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer, optimizer

    noise = torch.Generator().manual_seed(9)
    monkeypatch.setattr(Entropy, "gaussian", lambda self, n, device, secure: torch.randn(n, generator=noise))
    module, _ = train(DPSGD(noise_multiplier=0.8, max_grad_norm=0.5, unsafe_seed=2))

    noise.manual_seed(9)
    theirs, dataset = Net(), data()
    wrapped = GradSampleModule(theirs.net)
    inner = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    dp = DPOptimizer(inner, noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=BATCH)
    drawn = iter(())

    def same_noise(std, reference, **kwargs):
        nonlocal drawn
        piece = next(drawn, None)
        if piece is None:
            sizes = [p.numel() for p in theirs.parameters()]
            drawn = iter(torch.randn(sum(sizes), generator=noise).split(sizes))
            piece = next(drawn)
        return std * piece.view_as(reference)

    monkeypatch.setattr(optimizer, "_generate_noise", same_noise)
    for indices in batches_of(2, 10):
        x, y = dataset[indices]
        dp.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        dp.step()
    assert torch.allclose(flat(module), flat(theirs), rtol=0, atol=1e-6)


def test_noise_reaches_the_weights():
    module, _ = train(DPSGD(noise_multiplier=1e6), max_epochs=1)
    moved = (flat(module) - flat(Net())).std()
    steps, lr = 5, 0.1
    assert moved == pytest.approx(math.sqrt(steps) * lr * 1e6 / BATCH, rel=0.3)


def test_every_step_has_its_noise_and_its_entry(monkeypatch):
    drawn = []
    gaussian = Entropy.gaussian
    monkeypatch.setattr(Entropy, "gaussian", lambda self, n, *args: drawn.append(gaussian(self, n, *args)) or drawn[-1])
    callback = DPSGD(noise_multiplier=2.0, accountant="rdp")
    module, trainer = train(callback)
    parameters = flat(module).numel()
    assert [len(d) for d in drawn] == [parameters] * trainer.global_step
    assert len({float(d[0]) for d in drawn}) == trainer.global_step
    assert [list(segment) for segment in callback.history] == [[2.0, BATCH / N, trainer.global_step]]


def test_secure_mode_draws_every_bit_from_the_system(monkeypatch):
    asked = []
    gaussian = Entropy.gaussian
    monkeypatch.setattr(Entropy, "gaussian", lambda self, *args: asked.append(args[2]) or gaussian(self, *args))
    module, trainer = train(DPSGD(noise_multiplier=1.0, accountant="rdp", secure_mode=True), max_epochs=1)
    assert asked == [True] * trainer.global_step
    assert torch.isfinite(flat(module)).all()


def test_runs_differ_though_everything_is_seeded():
    weights = []
    for _ in range(2):
        pl.seed_everything(42)
        weights.append(flat(train(DPSGD(noise_multiplier=1.0, accountant="rdp"), max_epochs=1)[0]))
    assert not torch.equal(*weights)


@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
def test_micro_batches_accumulation_and_workers_do_not_change_the_result():
    settings = {"noise_multiplier": 0, "max_grad_norm": 0.4, "unsafe_seed": 1}
    whole = flat(train(DPSGD(**settings))[0])
    assert torch.allclose(whole, flat(train(DPSGD(**settings, physical_batch_size=2))[0]), atol=1e-6)
    accumulated = train(DPSGD(**settings), loaders=loader(batch_size=BATCH // 2), accumulate_grad_batches=2)
    assert torch.allclose(whole, flat(accumulated[0]), atol=1e-6)
    assert accumulated[1].global_step == 10
    assert torch.allclose(whole, flat(train(DPSGD(**settings), loaders=loader(num_workers=1))[0]), atol=1e-6)


@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
@pytest.mark.parametrize("clipping", [Automatic(), PerLayer()])
def test_other_ways_to_clip_bound_each_step(clipping):
    callback = DPSGD(noise_multiplier=0, max_grad_norm=0.01, clipping=clipping, dataset_size=N, sample_rate=1 / N)
    before = Net()
    module, _ = train(callback, max_epochs=1, max_steps=1)
    # one example on average; a few at most
    assert (flat(module) - flat(before)).norm() <= 0.1 * 0.01 * 8


@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
def test_views_of_an_example_are_averaged_before_the_clip():
    class Augmented(Dataset):
        def __init__(self):
            self.calls = 0

        def __len__(self):
            return N

        def __getitem__(self, i):
            self.calls += 1
            x, y = data()[i]
            return (x if self.calls % 2 else -x), y

    settings = {"noise_multiplier": 0, "max_grad_norm": 0.3, "unsafe_seed": 4, "preflight": False}
    dataset = Augmented()
    callback = DPSGD(**settings, augmentation_multiplicity=2)
    module, _ = train(callback, loaders=DataLoader(dataset, BATCH), max_steps=1)
    expected = Net()
    total, start = torch.zeros_like(flat(expected)), flat(expected)
    for i in batches_of(4, 1)[0]:
        x, y = data()[i]
        loss = cross_entropy(expected.net(torch.stack([x, -x])), torch.stack([y, y]))
        g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(expected.parameters()))])
        total += g * min(1.0, 0.3 / float(g.norm()))
    assert torch.allclose(flat(module), start - 0.1 * total / BATCH, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_example_that_is_not_finite_contributes_zero_and_is_counted(value):
    bad = data()
    bad.tensors[0][7] = value
    callback = DPSGD(noise_multiplier=0, max_grad_norm=1.0, sample_rate=1.0, preflight=False)
    with pytest.warns(UserWarning, match="not finite|void"):
        module, _ = train(callback, loaders=DataLoader(bad, BATCH), max_epochs=3)
    assert torch.isfinite(flat(module)).all()
    assert callback.zeroed_examples == 3


def test_the_raw_gradient_is_nowhere_to_be_seen():
    class Curious(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_after_backward(self, trainer, pl_module):
            self.seen.append(max(float(p.grad.abs().max()) for p in pl_module.parameters() if p.grad is not None))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.norm = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()

    for order in (lambda c, d: (c, d), lambda c, d: (d, c)):
        curious = Curious()
        _, trainer = train(*order(curious, DPSGD(noise_multiplier=1e3, accountant="rdp")), max_epochs=1)
        assert set(curious.seen) == {0.0}
        assert curious.norm > 100
        assert [type(c).__name__ for c in trainer.callbacks[:2]] in (["Curious", "DPSGD"], ["DPSGD", "Curious"])


def test_gradient_clip_val_is_post_processing():
    class Norms(pl.Callback):
        norms = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if pl_module.net[0].weight.grad is not None:
                self.norms.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))

    train(DPSGD(noise_multiplier=1e3, accountant="rdp"), Norms(), gradient_clip_val=0.01)
    assert Norms.norms
    assert max(Norms.norms) <= 0.0101


# --- the loop stays right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("physical", [None, 2])
def test_schedulers_steps_and_limits_are_the_users(physical):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.total = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    callback = DPSGD(target_epsilon=3.0, physical_batch_size=physical, accountant="rdp")
    module, trainer = train(callback, module=Scheduled(), max_epochs=3)
    assert module.total == trainer.global_step == 15
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 15
    for limit, steps in ((2, 2), (0.4, 2)):
        callback = DPSGD(noise_multiplier=1.0, physical_batch_size=physical, accountant="rdp")
        _, trainer = train(callback, max_epochs=1, limit_train_batches=limit)
        assert trainer.global_step == steps
        assert trainer.limit_train_batches == limit
        assert trainer.accumulate_grad_batches == 1


def test_validation_in_the_middle_of_an_epoch_counts_in_the_users_batches():
    class Counting(Net):
        validated = 0

        def on_validation_epoch_start(self):
            self.validated += not self.trainer.sanity_checking

    module = Counting()
    callback = DPSGD(noise_multiplier=1.0, physical_batch_size=2, accountant="rdp")
    trainer = make_trainer(pl.Trainer, callback, max_epochs=1, val_check_interval=2)
    trainer.fit(module, loader(), loader(shuffle=False))
    assert module.validated == 2
    assert trainer.val_check_interval == 2


# --- budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"min_epochs": 9, "max_epochs": 9}, {"min_steps": 50, "max_epochs": 50}])
def test_the_budget_is_a_hard_stop(settings):
    callback = DPSGD(target_epsilon=2.0, noise_multiplier=1.4, accountant="rdp")
    with pytest.warns(UserWarning, match="the budget allows"):
        _, trainer = train(callback, **settings)
    assert 0 < trainer.global_step < 45
    assert callback.epsilon() <= 2.0
    more = list(callback.history)
    more[-1] = (*more[-1][:2], more[-1][2] + 1)
    from robust_train.privacy.accounting import epsilon

    assert epsilon(more, N**-1.1, "rdp") > 2.0  # not one step less than there could be
    with pytest.warns(UserWarning, match="the budget allows 0 more steps"):
        module, again = train(callback, max_epochs=5)  # a second fit gets nothing
    assert again.global_step == 0
    assert torch.equal(flat(module), flat(Net()))
    assert callback.epsilon() <= 2.0


def test_noise_is_calibrated_to_the_run():
    callback = DPSGD(target_epsilon=3.0, target_delta=1e-3)
    _, trainer = train(callback, max_epochs=4)
    assert trainer.global_step == 20
    assert 2.9 < callback.epsilon() <= 3.0
    assert float(trainer.callback_metrics["privacy/epsilon"]) == pytest.approx(callback.epsilon())


def test_a_second_fit_composes():
    callback = DPSGD(noise_multiplier=1.5, accountant="rdp")
    train(callback, max_epochs=1)
    once = callback.epsilon()
    train(callback, max_epochs=1)
    assert callback.history == [(1.5, BATCH / N, 10)]
    assert callback.epsilon() > once


def test_a_noise_schedule_is_followed_and_accounted_for():
    callback = DPSGD(target_epsilon=3.0, noise_schedule=(2.0, 1.0), accountant="rdp")
    train(callback, max_epochs=4)
    (first, _, a), (second, _, b) = callback.history
    assert first == pytest.approx(2 * second)
    assert (a, b) == (10, 10)
    assert 2.9 < callback.epsilon() <= 3.0


def test_early_stopping_may_look_at_epsilon():
    callback = DPSGD(noise_multiplier=1.0, accountant="rdp")
    stop = EarlyStopping("privacy/epsilon", patience=100, divergence_threshold=3.5, mode="min")
    trainer = make_trainer(pl.Trainer, stop, callback, max_epochs=30)
    trainer.fit(Net(), loader(), loader(shuffle=False))
    assert 1 < trainer.current_epoch < 29
    assert callback.epsilon() > 3.5


def test_what_has_no_end_needs_a_noise_multiplier():
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        train(DPSGD(target_epsilon=3.0), max_epochs=-1)
    callback = DPSGD(target_epsilon=1.0, noise_multiplier=3.0, accountant="rdp")
    _, trainer = train(callback, max_epochs=-1)
    assert trainer.global_step > 5
    assert callback.epsilon() <= 1.0


# --- checkpoints, interruption, resume ----------------------------------------------------------------------------


class Stops(pl.Callback):
    """Breaks the run off after some steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step >= self.at:
            raise KeyError("the power went")


def saving(path, every=2):
    return ModelCheckpoint(path, every_n_train_steps=every, save_top_k=-1, filename="{step}")


def test_a_checkpoint_needs_nothing_of_ours_to_load(tmp_path):
    train(DPSGD(target_epsilon=3.0, accountant="rdp"), saving(tmp_path), enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == Net().state_dict().keys()
    ours = checkpoint["callbacks"]["DPSGD"]
    assert json.loads(json.dumps(ours["certificate"]))["steps"] == 4
    text = json.dumps(ours)
    assert "seed" not in text.replace("unsafe_seed", "")  # no state of any generator
    Net.load_from_checkpoint(tmp_path / "step=4.ckpt", weights_only=True)
    make_trainer(pl.Trainer).validate(
        Net(), loader(shuffle=False), ckpt_path=tmp_path / "step=4.ckpt", verbose=False, weights_only=True
    )


@pytest.mark.parametrize("physical", [None, 3])
def test_a_resumed_run_goes_on_and_counts_what_a_crash_lost(tmp_path, physical):
    settings = {"target_epsilon": 3.0, "target_delta": 1e-3, "accountant": "rdp", "physical_batch_size": physical}
    first = DPSGD(**settings)
    with pytest.raises(KeyError):
        train(first, Stops(7), saving(tmp_path), max_epochs=4, enable_checkpointing=True)
    assert sum(n for *_, n in first.history) == 7
    sigma = first.history[0][0]
    second = DPSGD(**settings)
    with pytest.warns(UserWarning, match="the budget allows 13 more steps, fewer than the 14"):
        _, trainer = train(second, max_epochs=4, ckpt_path=tmp_path / "step=6.ckpt")
    assert second.history == [(sigma, BATCH / N, 20)]  # the noise stays
    assert trainer.global_step == 19  # one was lost, and counts
    assert 2.9 < second.epsilon() <= 3.0


def test_a_run_resumed_within_an_accumulation_window_keeps_step(tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == 9:  # within a window of nine micro-batches
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    settings = {"noise_multiplier": 1.0, "accountant": "rdp", "physical_batch_size": 3}
    _, whole = train(DPSGD(**settings), Saves(), max_epochs=2)
    second = DPSGD(**settings)
    _, trainer = train(second, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == whole.global_step == 10
    assert sum(n for *_, n in second.history) == 10 + 9  # the first run had gone on to its end


def test_a_missing_journal_is_an_error_with_a_way_out(tmp_path):
    settings = {"noise_multiplier": 1.0, "accountant": "rdp"}
    train(DPSGD(**settings), saving(tmp_path), max_epochs=1, enable_checkpointing=True)
    (journal,) = tmp_path.glob("privacy_journal_*.jsonl")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    journal.rename(moved / journal.name)
    with pytest.raises(ValueError, match=r"journal privacy_journal_\w+.jsonl of this run is missing"):
        train(DPSGD(**settings), ckpt_path=tmp_path / "step=4.ckpt")
    third = DPSGD(**settings, lost_steps=2)
    train(third, max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt")
    assert third.history == [(1.0, BATCH / N, 4 + 2 + 6)]


def test_evaluating_an_older_checkpoint_takes_nothing_back(tmp_path):
    callback = DPSGD(noise_multiplier=1.0, accountant="rdp")
    module, trainer = train(callback, saving(tmp_path), max_epochs=2, enable_checkpointing=True)
    spent = callback.epsilon()
    trainer.validate(module, loader(shuffle=False), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert callback.epsilon() == spent
    assert sum(n for *_, n in callback.history) == 10


def test_a_checkpoint_of_another_kind_of_training_is_refused(tmp_path):
    train(saving(tmp_path), enable_checkpointing=True)
    with pytest.raises(ValueError, match="was not trained with DPSGD"):
        train(DPSGD(noise_multiplier=1.0), ckpt_path=tmp_path / "step=4.ckpt", max_epochs=5)


def test_changed_settings_recalibrate_to_what_is_left(tmp_path):
    train(DPSGD(target_epsilon=2.0, accountant="rdp"), saving(tmp_path, 5), max_epochs=1, enable_checkpointing=True)
    second = DPSGD(target_epsilon=4.0, accountant="rdp")
    train(second, max_epochs=4, ckpt_path=tmp_path / "step=5.ckpt")
    assert len(second.history) == 2
    assert sum(n for *_, n in second.history) == 20
    assert 3.8 < second.epsilon() <= 4.0


def test_the_certificate_lies_in_the_run_folder_and_can_be_checked(tmp_path):
    from robust_train.privacy.certificate import Certificate

    callback = DPSGD(target_epsilon=3.0, accountant="rdp")
    train(callback, max_epochs=2, default_root_dir=tmp_path / "run")
    found = Certificate.read(tmp_path / "run" / "privacy_certificate.json")
    assert found.epsilon == callback.epsilon()
    assert found.verify().right
    assert found.steps == 10
    assert found.engine == "book_keeping"
    assert any("read from the train loader" in assumption for assumption in found.assumptions)
    with pytest.warns(UserWarning, match="void: unsafe_seed"):
        train(DPSGD(noise_multiplier=1.0, unsafe_seed=1), max_epochs=1, default_root_dir=tmp_path / "void")
    assert Certificate.read(tmp_path / "void" / "privacy_certificate.json").epsilon is None


@pytest.mark.parametrize("fails", [False, True])
def test_module_and_trainer_are_as_before_afterwards(fails):
    module = Net()
    attributes, hooks = set(vars(module)), len(module.net[0]._forward_hooks)
    others = [DPSGD(noise_multiplier=1.0, physical_batch_size=2, engine=e, accountant="rdp") for e in ("hooks",)]
    trainer = make_trainer(pl.Trainer, *([Stops(3)] if fails else []), *others, max_epochs=1)
    before = trainer.accumulate_grad_batches, trainer.limit_train_batches, trainer.max_steps, list(trainer.callbacks)
    if fails:
        with pytest.raises(KeyError):
            trainer.fit(module, loader())
    else:
        trainer.fit(module, loader())
    after = trainer.accumulate_grad_batches, trainer.limit_train_batches, trainer.max_steps, list(trainer.callbacks)
    assert after == before
    assert set(vars(module)) - attributes <= {"_metric_attributes", "_hparams"}  # Lightning's own
    assert len(module.net[0]._forward_hooks) == hooks
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    copy.deepcopy(module)


# --- other settings of a Trainer ----------------------------------------------------------------------------------


def test_bf16_weight_averaging_parameter_groups_and_frozen_layers():
    class Grouped(Net):
        def configure_optimizers(self):
            self.net[0].bias.requires_grad_(False)
            groups = [{"params": self.net[0].parameters(), "lr": 0.5}, {"params": self.net[2].parameters()}]
            return torch.optim.AdamW(groups, lr=0.01)

    from pytorch_lightning.callbacks import StochasticWeightAveraging

    callback = DPSGD(noise_multiplier=1.0, accountant="rdp")
    module, trainer = train(
        callback, StochasticWeightAveraging(0.1, swa_epoch_start=1), module=Grouped(), precision="bf16-mixed"
    )
    start = Net()
    assert trainer.global_step == 10
    assert torch.equal(module.net[0].bias, start.net[0].bias)
    assert not torch.equal(module.net[0].weight, start.net[0].weight)
    assert torch.isfinite(flat(module)).all()


@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
@pytest.mark.parametrize("order", [1, -1])
def test_averages_of_weights_are_those_of_the_private_run(order):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    settings = {"noise_multiplier": 0, "max_grad_norm": 0.4, "unsafe_seed": 1}
    plain = train(DPSGD(**settings))[0]
    averaged, _ = train(*(DPSGD(**settings), EMAWeightAveraging(decay=0.5))[::order])
    assert averaged.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(flat(averaged), flat(plain))
    assert (flat(averaged) - flat(plain)).norm() < (flat(averaged) - flat(Net())).norm()


def test_a_transformer_trains():
    class Transformer(Net):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.net = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Linear(1, 8), encoder, nn.Flatten(), nn.Linear(48, 3))

    callback = DPSGD(target_epsilon=3.0, accountant="rdp")
    module, trainer = train(callback, module=Transformer())
    assert trainer.global_step == 10
    assert torch.isfinite(flat(module)).all()
    assert callback.certificate().engine == "book_keeping"


@pytest.mark.parametrize("engine", ["book_keeping", "hooks"])
@pytest.mark.filterwarnings("ignore:DPSGD. the certificate is void:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_nets_give_the_same(engine):
    settings = {"noise_multiplier": 0, "max_grad_norm": 0.4, "unsafe_seed": 1, "engine": engine}
    plain = flat(train(DPSGD(**settings))[0])
    module = Net()
    module.net = torch.compile(module.net, backend="eager")
    assert torch.allclose(plain, flat(train(DPSGD(**settings), module=module)[0]), atol=1e-6)


def test_adversarial_examples_are_not_recorded():
    from robust_train import PGD, AdversarialTraining, Threat

    class Images(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self.net(x), y)

    attack = AdversarialTraining(PGD(steps=2), Threat(eps=0.1, low=-math.inf, high=math.inf))
    for engine in ("book_keeping", "hooks"):
        for order in (1, -1):
            callback = DPSGD(noise_multiplier=1.0, accountant="rdp", engine=engine)
            module, trainer = train(*(attack, callback)[::order], module=Images())
            assert torch.isfinite(flat(module)).all()
            assert trainer.global_step == 10


# --- what cannot work ---------------------------------------------------------------------------------------------


class BatchNormed(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Affineless(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False, track_running_stats=False))
        self.net = nn.Sequential(self.net[0], Standardised(), nn.Linear(8, 3))


class Standardised(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 1e-3)


class Steps(Net):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self, *batch)


WEIGHTS = torch.tensor([0.1, 1.0, 5.0])
VOID = {
    "class weights": (lambda m, x, y: cross_entropy(m.net(x), y, weight=WEIGHTS), "other examples of its batch"),
    "sum": (lambda m, x, y: cross_entropy(m.net(x), y, reduction="sum"), "times as long"),
    "mixup": (lambda m, x, y: cross_entropy(m.net(0.5 * x + 0.5 * x.flip(0)), y), "other examples of its batch"),
    "contrastive": (lambda m, x, y: cross_entropy(m.net(x) @ m.net(x).T, y), "other examples of its batch"),
    "penalty": (lambda m, x, y: cross_entropy(m.net(x), y) + m.net[0].weight.square().sum(), "do not add up"),
    "functional": (
        lambda m, x, y: cross_entropy(m.net(x) + nn.functional.linear(x, m.net[0].weight)[:, :3], y),
        "do not add up",
    ),
}


@pytest.mark.parametrize("what", VOID)
def test_a_step_for_which_no_epsilon_would_hold_is_refused(what):
    loss, message = VOID[what]
    module = Steps(loss)
    start = flat(module)
    with pytest.raises(ValueError, match=rf"no epsilon would hold.*{message}") as error:
        train(DPSGD(noise_multiplier=1.0, accountant="rdp"), module=module)
    assert "training_step (test_dp_sgd.py:" in str(error.value)
    assert torch.equal(flat(module), start)


def test_a_layer_that_mixes_examples_is_named():
    with pytest.raises(ValueError, match=r"'net.1' \(Standardised\) mixes the examples of a batch"):
        train(DPSGD(noise_multiplier=1.0, accountant="rdp"), module=Affineless())
    with pytest.raises(ValueError, match="BatchNorm1d 'net.1': it mixes the examples"):
        train(DPSGD(noise_multiplier=1.0, accountant="rdp"), module=BatchNormed())


def test_fix_modules_puts_group_normalisation_in_place(caplog):
    module, _ = train(DPSGD(noise_multiplier=1.0, accountant="rdp", fix_modules=True), module=BatchNormed())
    assert isinstance(module.net[1], nn.GroupNorm)
    assert "net.1: BatchNorm1d" in caplog.text


def manual(module):
    module.automatic_optimization = False
    return module


def two_optimizers():
    class Two(Net):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]

    return manual(Two())


def weighted():
    return DataLoader(data(), BATCH, sampler=torch.utils.data.WeightedRandomSampler(torch.ones(N), N))


def streamed():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    return DataLoader(Stream(), BATCH)


REFUSED = {
    "manual optimization": ({"module": lambda: manual(Net())}, {}, "manual optimization"),
    "two optimizers": ({"module": two_optimizers}, {}, "manual optimization"),
    "a weighted sampler": ({"loaders": weighted}, {}, "WeightedRandomSampler"),
    "an iterable dataset": ({"loaders": streamed}, {}, "Stream"),
    "two loaders": ({"loaders": lambda: [loader(), loader()]}, {}, "one DataLoader"),
    "overfit_batches": ({}, {"overfit_batches": 2}, "overfit_batches"),
    "reloading": ({}, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused(what):
    made, settings, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        train(DPSGD(noise_multiplier=1.0), **{k: make() for k, make in made.items()}, **settings)


def test_two_of_them_and_callbacks_that_train_without_noise_are_refused():
    from pytorch_lightning.callbacks import GradientAccumulationScheduler, LearningRateFinder

    with pytest.raises(ValueError, match="second DPSGD"):
        train(DPSGD(noise_multiplier=1.0), DPSGD(noise_multiplier=2.0))
    for other in (GradientAccumulationScheduler({0: 2}), LearningRateFinder()):
        with pytest.raises(ValueError, match=type(other).__name__):
            train(DPSGD(noise_multiplier=1.0), other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "target_epsilon"),
        ({"target_epsilon": 0}, "target_epsilon must be"),
        ({"target_epsilon": math.nan}, "target_epsilon must be"),
        ({"noise_multiplier": -1}, "noise_multiplier must be"),
        ({"noise_multiplier": 1.0, "target_delta": 1.0}, "target_delta must be"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0}, "max_grad_norm must be"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.inf}, "bounds no example"),
        ({"noise_multiplier": 1.0, "sample_rate": 1.5}, "sample_rate must be"),
        ({"noise_multiplier": 1.0, "physical_batch_size": 0}, "physical_batch_size must be"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, "accountant must be one of prv"),
        ({"noise_multiplier": 1.0, "engine": "ghost"}, "engine must be one of auto"),
        ({"noise_multiplier": 1.0, "noise_schedule": ()}, "noise_schedule must be"),
        ({"noise_multiplier": 0, "target_epsilon": 3.0}, "no finite epsilon"),
        ({"noise_multiplier": 1.0, "augmentation_multiplicity": 4, "physical_batch_size": 3}, "holds no example"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DPSGD(**settings)


def test_a_clipping_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="clipping must be"):
        DPSGD(noise_multiplier=1.0, clipping="flat")


def test_fp16_is_refused():
    trainer = make_trainer(pl.Trainer, DPSGD(noise_multiplier=1.0))
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer.fit(Net(), loader())


def test_the_seams_hold():
    """What the callback takes for granted in Lightning."""
    trainer = make_trainer(pl.Trainer)
    assert _seams.micro_batches_begun(trainer) == 0
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
