"""The output of a submodule is attacked instead of the batch: embeddings of token ids, and FreeLB."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from foreign.cases import CASES
from foreign.data import loader
from foreign.runs import assert_same, fit, make_trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from robust_train import (
    ALP,
    FGSM,
    MIFGSM,
    PGD,
    PGDAT,
    TRADES,
    AdversarialTraining,
    FreeLB,
    RobustEvaluation,
    Square,
    Threat,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
]
WORDS, LENGTH, CLASSES = 30, 7, 3
EPS = 0.6


def ball(eps=EPS, norm="l2") -> Threat:
    return Threat(norm, eps, low=-math.inf, high=math.inf)


def token_columns(n=24, seed=0):
    """Sentences (n, 7) of 3 to 7 words whose class is the commonest third of the vocabulary; padding is 0."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    ids = torch.randint(1, WORDS, (n, LENGTH), generator=g)
    own = 1 + 9 * y[:, None] + torch.randint(9, (n, LENGTH), generator=g)
    ids = torch.where(torch.rand(n, LENGTH, generator=g) < 0.6, own, ids)
    length = torch.randint(3, LENGTH + 1, (n,), generator=g)
    return ids.masked_fill(torch.arange(LENGTH) >= length[:, None], 0), y


class Tuples(pl.LightningModule):
    """Mean of the words' vectors after a layer with dropout; shows what that layer was given."""

    seen: ClassVar[list[torch.Tensor]] = []  # of the class: the callback takes it for nobody's state

    def __init__(self, dropout=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict(
            {
                "embedding": nn.Embedding(WORDS, 6, padding_idx=0),
                "mix": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout)),
                "head": nn.Linear(8, CLASSES),
            }
        )

    def forward(self, ids):
        vectors = self.net["embedding"](ids)
        Tuples.seen.append(vectors.detach().clone())
        words = (ids != 0).unsqueeze(-1)
        return self.net["head"]((self.net["mix"](vectors) * words).sum(1) / words.sum(1))

    def training_step(self, batch, batch_idx):
        ids, y = batch
        loss = F.cross_entropy(self(ids), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        ids, y = batch
        self.log("val_loss", F.cross_entropy(self(ids), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Dicts(Tuples):
    """As tokenisers hand it over."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["input_ids"] * batch["attention_mask"], batch["labels"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch["input_ids"] * batch["attention_mask"], batch["labels"]), batch_idx)


class Manual(Tuples):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def as_dict(ids, y):
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": y}


def data_for(kind, n=24):
    make = as_dict if kind is Dicts else None
    return {
        "train_dataloaders": loader(*token_columns(n), as_batch=make, shuffle=True),
        "val_dataloaders": loader(*token_columns(12, seed=1), as_batch=make),
    }


def training(attack=None, eps=EPS, objective=None, norm="l2", **settings) -> AdversarialTraining:
    attack = PGD(steps=3) if attack is None else attack
    return AdversarialTraining(attack, ball(eps, norm), objective, **{"layer": "net.embedding", **settings})


def run(kind, *callbacks, module=None, **settings):
    Tuples.seen.clear()
    return fit(CASES["tuple"], *callbacks, module=kind() if module is None else module, data=data_for(kind), **settings)


# --- nothing is disturbed ---------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 3},
    "bf16": {"precision": "bf16-mixed"},
    "clip": {"gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_of_radius_zero_changes_no_bit(mode, settings):
    plain = run(Tuples, **SETTINGS[settings]).trace
    assert_same(plain, run(Tuples, training(eps=0, mode=mode), **SETTINGS[settings]).trace)


@pytest.mark.parametrize("kind", [Dicts, Manual])
def test_an_attack_of_radius_zero_changes_no_bit_whatever_the_batch_and_the_loop(kind):
    settings = {"accumulate_grad_batches": 2} if kind is Dicts else {}
    assert_same(run(kind, **settings).trace, run(kind, training(eps=0), **settings).trace)


def test_evaluation_leaves_training_alone():
    evaluation = RobustEvaluation(PGD(steps=3), ball(), layer="net.embedding")
    assert_same(run(Tuples).trace, run(Tuples, evaluation).trace)


def test_afterwards_no_hook_is_left():
    module = run(Tuples, training(), RobustEvaluation(PGD(steps=2), ball(), layer="net.embedding")).module
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


# --- what is perturbed ------------------------------------------------------------------------------------------------


class Still(Tuples):
    """Learns nothing, so that every batch can be held against the first weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("kind", [Tuples, Dicts])
def test_the_training_step_sees_words_moved_within_the_ball_and_padding_as_it_was(kind, norm):
    class Module(kind):
        configure_optimizers = Still.configure_optimizers

    ids, _ = token_columns()
    data = {"train_dataloaders": loader(*token_columns(), as_batch=as_dict if kind is Dicts else None)}
    Tuples.seen.clear()
    done = fit(CASES["tuple"], training(norm=norm), module=Module(), data=data, max_epochs=1)
    # 3 attacked passes and the real one for each batch
    real, table = Tuples.seen[3::4] if kind is Tuples else Tuples.seen[3::4], done.module.net["embedding"].weight
    assert len(Tuples.seen) == 3 * 4
    for vectors, part in zip(real, ids.split(8), strict=True):
        delta = (vectors - table[part]).detach()
        assert bool((delta[part == 0] == 0).all())
        assert bool((delta[part != 0] != 0).all())
        size = delta.flatten(1).norm(dim=1) if norm == "l2" else delta.abs().flatten(1).amax(1)
        assert float(size.max()) <= EPS * (1 + 1e-5)
        assert float(size.min()) > 0.9 * EPS


def test_the_embedding_is_trained_on_what_the_rest_saw():
    grads, module = [], Tuples(dropout=0.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    module.on_before_optimizer_step = lambda _: grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
    ids, y = token_columns(8)
    Tuples.seen.clear()
    fit(CASES["tuple"], training(), module=module, data={"train_dataloaders": loader(ids, y)}, max_epochs=1)
    delta = Tuples.seen[-1] - module.net["embedding"](ids).detach()
    own = nn.Embedding.forward
    module.net["embedding"].forward = lambda i: own(module.net["embedding"], i) + delta
    wanted = torch.autograd.grad(F.cross_entropy(module(ids), y), list(module.parameters()))
    for (name, _), value in zip(module.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(grads[0][name], value, rtol=1e-4, atol=1e-7)
    assert float(grads[0]["net.embedding.weight"].abs().max()) > 0


@pytest.mark.parametrize(
    "objective", [PGDAT(clean_weight=0.5), TRADES(), ALP(), FreeLB()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("kind", [Tuples, Manual])
def test_every_objective_trains_on_it(kind, objective):
    metrics = run(kind, training(objective=objective)).trainer.callback_metrics
    assert math.isfinite(float(metrics["train/adv_loss"]))


@pytest.mark.parametrize("attack", [FGSM(noise=1), MIFGSM(steps=2)], ids=lambda a: type(a).__name__)
def test_other_attacks_find_it(attack):
    assert "train/adv_loss" in run(Tuples, training(attack)).trainer.callback_metrics


def test_any_layer_can_be_named_and_reports_name_it():
    said = []

    class Telling(AdversarialTraining):
        def announce(self, trainer, text):
            said.append(text)

    callback = Telling(PGD(steps=2), ball(), layer="net.mix.0")
    assert "train/adv_loss" in run(Tuples, callback).trainer.callback_metrics
    assert "L2 ball of radius 0.6 in [-inf, inf], around the output of net.mix.0; objective" in said[0]
    evaluation = RobustEvaluation(PGD(steps=2), ball(), layer="net.embedding")
    trainer = make_trainer(pl.Trainer, evaluation)
    module = Tuples()
    module.test_step = module.validation_step
    trainer.test(module, data_for(Tuples)["val_dataloaders"], verbose=False)
    assert evaluation.evaluation.threat.endswith("in [-inf, inf], around the output of net.embedding")


def test_it_makes_a_text_classifier_robust():
    def robust(*callbacks):
        module = run(Tuples, *callbacks, max_epochs=12, limit_val_batches=0).module
        evaluation = RobustEvaluation({"pgd": PGD(steps=20)}, ball(), layer="net.embedding")
        trainer = make_trainer(pl.Trainer, evaluation)
        trainer.validate(module, loader(*token_columns(120, seed=3)), verbose=False)
        return {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items()}

    plain, hardened = robust(), robust(training())
    assert plain["robust_acc"] < plain["clean_acc"] - 0.1
    assert hardened["robust_acc"] > plain["robust_acc"] + 0.03


# --- FreeLB -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}])
def test_the_gradient_of_freelb_is_the_mean_over_the_points_that_the_attack_visits(settings):
    grads, module = [], Tuples(dropout=0.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    module.on_before_optimizer_step = lambda _: grads.append([p.grad.clone() for p in module.parameters()])
    ids, y = token_columns(8)
    Tuples.seen.clear()
    callback = training(PGD(steps=2), objective=FreeLB(), mode="train")
    data = {"train_dataloaders": loader(ids, y)}
    done = fit(CASES["tuple"], callback, module=module, data=data, max_epochs=1, **settings)
    visited = list(Tuples.seen)
    assert len(visited) == 3
    own, losses = nn.Embedding.forward, []
    for point in visited:
        delta = point - module.net["embedding"](ids).detach()
        module.net["embedding"].forward = lambda i, d=delta: own(module.net["embedding"], i) + d
        losses.append(F.cross_entropy(module(ids), y))
        del module.net["embedding"].forward
    wanted = torch.autograd.grad(sum(losses) / 3, list(module.parameters()))
    close = {"rtol": 0.05, "atol": 2e-3} if settings else {"rtol": 1e-4, "atol": 1e-7}
    for value, want in zip(grads[0], wanted, strict=True):
        torch.testing.assert_close(value, want, **close)
    close = {"rtol": 0.05, "atol": 2e-3} if settings else {}
    torch.testing.assert_close(done.trainer.callback_metrics["train/adv_loss"], sum(losses) / 3, **close)


def test_freelb_costs_one_pass_a_point_and_sees_one_dropout_mask():
    masks = []

    class Module(Still):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.net["mix"][2].register_forward_hook(lambda m, a, out: masks.append(out == 0) if m.training else None)

    run(Module, training(PGD(steps=2), objective=FreeLB(), mode="train"), max_epochs=1, limit_val_batches=0)
    assert len(masks) == 3 * 3
    for k in range(0, 9, 3):
        assert torch.equal(masks[k], masks[k + 1])
        assert torch.equal(masks[k], masks[k + 2])


def test_without_a_radius_freelb_has_the_plain_gradient():
    def gradients(*callbacks):
        found, module = [], Tuples()
        module.on_before_optimizer_step = lambda _: found.append([p.grad.clone() for p in module.parameters()])
        run(Tuples, *callbacks, module=module, max_steps=1, limit_val_batches=0)
        return found[0]

    for a, b in zip(gradients(), gradients(training(eps=0, objective=FreeLB(), mode="train")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_freelb_also_trains_on_images():
    callback = AdversarialTraining(PGD(steps=2), Threat(eps=0.1), FreeLB(), mode="train")
    assert "train/adv_loss" in fit(CASES["tuple"], callback).trainer.callback_metrics


def test_freelb_says_when_the_attack_never_differentiates_the_own_loss():
    with pytest.raises(ValueError, match="FreeLB trains on the points where.*use PGD or FGSM"):
        run(Tuples, training(Square(queries=5), objective=FreeLB()))


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tuples, Dicts])
def test_evaluation_judges_each_example(kind):
    module = run(kind, max_epochs=8).module
    callback = RobustEvaluation({"pgd": PGD(steps=10), "square": Square(queries=20)}, ball(1.0), layer="net.embedding")
    trainer = make_trainer(pl.Trainer, callback)
    trainer.validate(module, data_for(kind)["val_dataloaders"], verbose=False)
    found = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items()}
    assert found["robust_acc"] < found["clean_acc"]
    assert found["robust_acc"] <= min(found["robust_acc_pgd"], found["robust_acc_square"])


# --- refusals ---------------------------------------------------------------------------------------------------------


class Twice(Tuples):
    def forward(self, ids):
        return super().forward(ids) + super().forward(ids)


class Never(Tuples):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(1, 1)


class TimeFirst(Tuples):
    def forward(self, ids):
        vectors = self.net["embedding"](ids.T)
        return self.net["head"](self.net["mix"](vectors).mean(0))


class Checkpointed(Tuples):
    def training_step(self, batch, batch_idx):
        return checkpoint(
            lambda ids: super(Checkpointed, self).training_step((ids, batch[1]), 0), batch[0], use_reentrant=False
        )

    validation_step = training_step


class Counts(Tuples):
    def __init__(self):
        super().__init__()
        self.counter = Counter()

    def forward(self, ids):
        self.counter(ids)
        return super().forward(ids)


class Counter(nn.Module):
    def forward(self, ids):
        return (ids != 0).sum(1)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "says"),
    [
        (Tuples, {"layer": "net.embeding"}, ValueError, "layer='net.embeding' is no submodule of Tuples"),
        (Twice, {}, ValueError, "layer='net.embedding' is called more than once in one step"),
        (Never, {"layer": "other"}, ValueError, "the step does not call layer='other'"),
        (TimeFirst, {}, ValueError, r"returns \(7, 8, 6\) for a batch of 8: the batch must come first"),
        (Checkpointed, {}, ValueError, "lies within activation checkpointing.*name a layer in front"),
        (Counts, {"layer": "counter"}, TypeError, "layer='counter' must return a floating-point tensor.*int64"),
        (Tuples, {"layer": None}, TypeError, 'holds torch.int64.*name the embedding with layer="…"'),
    ],
)
def test_what_cannot_be_perturbed_is_refused(kind, settings, error, says):
    with pytest.raises(error, match=says):
        run(kind, training(**settings))
    layer = settings.get("layer", "net.embedding")
    with pytest.raises(error, match=says):
        run(kind, RobustEvaluation(PGD(steps=2), ball(), layer=layer))


def test_embeddings_have_no_bounds():
    threat = Threat("l2", 0.1)
    for callback in (AdversarialTraining, RobustEvaluation):
        with pytest.raises(ValueError, match=r"output of layer='net.embedding'.*threat.low=-.inf"):
            run(Tuples, callback(PGD(steps=2), threat, layer="net.embedding"))


@pytest.mark.parametrize("callback", [AdversarialTraining, RobustEvaluation])
def test_either_a_part_of_the_batch_or_a_layer(callback):
    with pytest.raises(ValueError, match="either a part of the batch is attacked or the output of a layer"):
        callback(PGD(), ball(), inputs=0, layer="net.embedding")
    with pytest.raises(ValueError, match="layer must be a name or path, or null, got 3"):
        callback(PGD(), ball(), layer=3)


def test_a_layer_that_is_out_of_reach_in_the_real_step_is_never_trained_undefended():
    class Module(Tuples):
        calls: ClassVar[list[Any]] = []

        def forward(self, ids):
            Module.calls.append(1)
            if len(Module.calls) == 6:  # two to look, three to attack, and this
                return self.net["head"](self.net["mix"](F.embedding(ids, self.net["embedding"].weight)).mean(1))
            return super().forward(ids)

    with pytest.raises(RuntimeError, match="was called when the training step was attacked and is not now"):
        run(Module, training(), num_sanity_val_steps=0)
