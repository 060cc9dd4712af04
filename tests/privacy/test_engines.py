"""What every engine promises."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from privacy.exact import assert_near, check, exact, gradients, recorded, trained
from torch import Tensor, nn

from robust_train.privacy.clipping.automatic import Automatic
from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.clipping.per_layer import PerLayer
from robust_train.privacy.engines.base import RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.book_keeping import BookKeeping
from robust_train.privacy.engines.hooks import Hooks

ENGINES = [BookKeeping, Hooks]
every = pytest.mark.parametrize("kind", ENGINES)


class Net(nn.Module):
    """Layers with and without a rule, one without parameters, activations in place, and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.PReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
        )
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def ce(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 8, 8, generator=generator), torch.arange(6) % 3


@every
@pytest.mark.parametrize("clipping", [Flat(), PerLayer(), Automatic()], ids=str)
def test_every_clipping(kind, clipping, net, batch):
    check(kind, net, ce, batch, clipping=clipping)


@every
@pytest.mark.parametrize("views", [2, 3, 6])
def test_views_of_an_example_are_averaged_before_the_clip(kind, views, net, batch):
    check(kind, net, ce, batch, views=views)


@every
def test_scale_and_weights(kind, net, batch):
    weights = torch.tensor([1.0, 0.0, 0.5])
    check(kind, net, ce, batch, views=2, scale=4.0, weights=weights)


@every
def test_no_clipping_is_the_plain_gradient(kind, net, batch):
    plain = torch.autograd.grad(ce(net, *batch), trained(net))
    engine = kind(net, trained(net))
    recorded(engine, ce, batch)
    result = engine.clipped_sum(6, float("inf"), Flat())
    for g, p in zip(result.gradients, plain, strict=True):
        torch.testing.assert_close(g / 6, p)


@every
def test_the_sum_moves_by_at_most_the_bound_when_an_example_comes_or_goes(kind, net, batch):
    engine, sums = kind(net, trained(net)), []
    for weights in (torch.ones(6), torch.tensor([1.0, 1, 0, 1, 1, 1])):
        recorded(engine, ce, batch)
        result = engine.clipped_sum(6, 0.1, Flat(), weights=weights)
        sums.append(torch.cat([g.flatten() for g in result.gradients]))
    assert 0.099 < (sums[0] - sums[1]).norm() <= 0.1


@every
def test_an_example_that_is_not_finite_adds_zero(kind, net, batch):
    x, y = batch
    rows = gradients(net, ce, batch, 6)
    engine = kind(net, trained(net))
    for poison in (float("nan"), float("inf"), -float("inf")):
        bad = x.clone()
        bad[[1, 4]] = poison
        recorded(engine, ce, (bad, y))
        weights = torch.tensor([1.0, 1, 1, 1, 0, 1])
        result = engine.clipped_sum(6, 0.5, Flat(), weights=weights)
        assert result.norms.isfinite().tolist() == [True, False, True, True, False, True]
        assert result.zeroed == 1
        expected = exact(rows, 0.5, Flat(), torch.tensor([1.0, 0, 1, 1, 0, 1]))
        assert_near(type(result)(result.gradients, expected.norms, 1), expected, 1e-5)
        net.zero_grad()


@every
def test_a_mean_over_views_is_not_finite_where_one_view_is_not(kind, net, batch):
    x, y = batch
    x = x.index_fill(0, torch.tensor([3]), float("nan"))
    engine = kind(net, trained(net))
    recorded(engine, ce, (x, y))
    result = engine.clipped_sum(3, 0.5, Flat(), views=2)
    assert result.norms.isfinite().tolist() == [True, False, True]
    assert all(g.isfinite().all() for g in result.gradients)


@every
def test_frozen_parts(kind, net, batch):
    net.body[0].weight.requires_grad_(False)
    net.body[1].requires_grad_(False)
    net.head.bias.requires_grad_(False)
    check(kind, net, ce, batch)


@every
def test_some_parameters_only(kind, net, batch):
    rows = gradients(net, ce, batch, 6)
    wanted = [net.head.bias, net.body[3].weight]
    places = [next(i for i, p in enumerate(net.parameters()) if p is q) for q in wanted]
    engine = kind(net, wanted)
    recorded(engine, ce, batch)
    assert_near(engine.clipped_sum(6, 0.5, Flat()), exact([rows[i] for i in places], 0.5, Flat()), 1e-5)
    engine.stop()
    plain = torch.autograd.grad(ce(net, *batch), [net.body[3].bias])[0]
    torch.testing.assert_close(net.body[3].bias.grad, plain)


class Tied(nn.Module):
    """Words in and words out by one table, which is looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids) + self.words(ids.flip(1))))


@every
def test_tied_weights(kind):
    torch.manual_seed(0)
    ids = torch.randint(7, (4, 3))
    check(kind, Tied(), lambda module, ids: module(ids).square().flatten(1).sum(1).mean(), (ids,))


@every
def test_tied_weights_of_different_layers(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3), nn.Tanh(), nn.Conv2d(2, 4, 3))
    net[2].weight = net[0].weight
    net[4].bias = net[0].bias
    check(kind, net, lambda module, x: module(x).square().flatten(1).sum(1).mean(), (torch.randn(4, 2, 6, 6),))


@every
def test_layers_called_several_times(kind):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh())
    net = nn.Sequential(layers, layers, nn.Linear(5, 5), layers)
    check(kind, net, lambda module, x: module(x).square().flatten(1).sum(1).mean(), (torch.randn(4, 5),))
    check(kind, net, lambda module, x: module(x).square().flatten(1).sum(1).mean(), (torch.randn(4, 3, 5),))


@every
def test_clean_and_adversarial_passes_in_one_loss(kind, net, batch):
    def trades(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        clean, moved = module(x), module(x + 0.1 * x.sign())
        return F.cross_entropy(clean, y) + F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")

    check(kind, net, trades, batch)


def attacked(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack by hand, in train mode, between two passes that the loss depends on."""
    clean = module(x)
    moved = x.clone().requires_grad_()
    for _ in range(2):
        (g,) = torch.autograd.grad(F.cross_entropy(module(moved), y), moved)
        moved = (moved + 0.1 * g.sign()).detach().requires_grad_()
    return F.cross_entropy(clean, y) + F.cross_entropy(module(moved.detach()), y)


@every
def test_an_attack_in_the_training_step_is_not_recorded(kind, net, batch):
    check(kind, net, attacked, batch)


@every
@pytest.mark.parametrize("how", ["grad", "backward", "eval"])
def test_an_attack_within_paused_is_not_recorded(kind, how, net, batch):
    x, y = batch
    engine = kind(net, trained(net))
    rows = gradients(net, ce, batch, 6)
    engine.start()
    clean = ce(net, x, y)
    with engine.paused():
        moved = x.clone().requires_grad_()
        net.train(how != "eval")
        if how == "backward":
            ce(net, moved, y).backward()
            net.zero_grad()
        else:
            torch.autograd.grad(ce(net, moved, y), moved)
        net.train()
    engine.arm()
    clean.backward()
    assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)


@every
def test_an_exception_within_paused_ends_the_pause(kind, net, batch):
    engine = kind(net, trained(net))
    rows = gradients(net, ce, batch, 6)
    engine.start()
    with pytest.raises(KeyError), engine.paused():
        raise KeyError
    loss = ce(net, *batch)
    engine.arm()
    loss.backward()
    assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)


@every
def test_rows_that_are_not_the_batch(kind, net, batch):
    engine = kind(net, trained(net))
    recorded(engine, ce, batch)
    with pytest.raises(RowsMismatch, match=r"6.*in a batch of 5"):
        engine.clipped_sum(5, 1.0, Flat())


@every
def test_flattened_positions_are_not_rows(kind):
    net = nn.Linear(4, 2)
    engine = kind(net, trained(net))
    recorded(engine, lambda module, x: module(x.flatten(0, 1)).square().mean(), (torch.randn(3, 5, 4),))
    with pytest.raises(RowsMismatch, match="15"):
        engine.clipped_sum(3, 1.0, Flat())


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.InstanceNorm1d(4, affine=True)]
)
def test_one_example_without_a_batch(layer):
    """Its channels or positions would pass for rows."""
    engine = BookKeeping(layer, trained(layer))
    engine.start()
    x = torch.randn(4, 4)
    with pytest.raises(RowsMismatch, match="in place of a batch"):
        layer(x[0] if isinstance(layer, nn.Linear | nn.LayerNorm) else x)


@every
def test_several_backward_passes(kind, net, batch):
    engine = kind(net, trained(net))
    engine.start()
    losses = [ce(net, *batch), ce(net, *batch)]
    engine.arm()
    losses[0].backward()
    with pytest.raises(RowsMismatch, match="several backward passes"):
        losses[1].backward()


@every
def test_a_loss_that_reaches_back_to_an_earlier_step(kind, net, batch):
    engine = kind(net, trained(net))
    engine.start()
    earlier = ce(net, *batch)
    engine.start()
    loss = ce(net, *batch) + earlier
    engine.arm()
    with pytest.raises(RowsMismatch, match="earlier step"):
        loss.backward()


@every
def test_nothing_recorded(kind, net, batch):
    engine = kind(net, trained(net))
    loss = ce(net, *batch)
    engine.start()
    engine.arm()
    loss.backward()
    net.zero_grad()
    with pytest.raises(RowsMismatch, match=r"start\(\)"):
        engine.clipped_sum(6, 1.0, Flat())


@every
def test_what_was_recorded_is_forgotten(kind, net, batch):
    engine = kind(net, trained(net))
    rows = gradients(net, ce, batch, 6)
    for forget in (engine.start, engine.stop, lambda: engine.clipped_sum(6, 1.0, Flat())):
        recorded(engine, ce, (batch[0] + 1, batch[1]))
        forget()
        net.zero_grad()
        recorded(engine, ce, batch)
        assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)
        net.zero_grad()


@every
def test_a_step_that_broke_off_leaves_nothing(kind, net, batch):
    engine = kind(net, trained(net))
    rows = gradients(net, ce, batch, 6)

    def broken(_):
        raise KeyError

    engine.start()
    hidden = net.body(batch[0])
    hidden.register_hook(broken)
    loss = F.cross_entropy(net.head(hidden), batch[1])
    engine.arm()
    with pytest.raises(KeyError):
        loss.backward()
    net.zero_grad()
    recorded(engine, ce, batch)
    assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)


@every
def test_elsewhere_the_module_behaves_as_if_the_engine_were_not_there(kind, batch):
    torch.manual_seed(0)
    net = Net(dropout=0.5)
    torch.manual_seed(1)
    loss = ce(net, *batch)
    plain = torch.autograd.grad(loss, trained(net))
    engine = kind(net, trained(net))
    states = [engine.stop, engine.start]  # also while recording, the outputs are the same
    for state in states:
        state()
        torch.manual_seed(1)
        assert torch.equal(ce(net, *batch), loss)
    with engine.paused():
        torch.manual_seed(1)
        assert all(map(torch.equal, torch.autograd.grad(ce(net, *batch), trained(net)), plain))
    engine.stop()
    torch.manual_seed(1)
    assert all(map(torch.equal, torch.autograd.grad(ce(net, *batch), trained(net)), plain))


def trace(module: nn.Module) -> dict:
    """Everything that hangs on a module and its parameters, but for values."""
    found = {name: {k: repr(v) for k, v in vars(part).items()} for name, part in module.named_modules()}
    found |= {name: sorted(vars(p)) for name, p in module.named_parameters()}
    return found


@every
def test_close_leaves_no_trace(kind, net, batch):
    before = trace(net)
    engine = kind(net, trained(net))
    recorded(engine, ce, batch)
    engine.clipped_sum(6, 1.0, Flat())
    engine.start()
    ce(net, *batch)  # a step that breaks off
    engine.close()
    net.zero_grad()
    assert trace(net) == before
    check(kind, net, ce, batch)  # and another engine may come


@every
def test_state_dicts_are_the_same(kind, net):
    before = net.state_dict()
    kind(net, trained(net))
    assert list(net.state_dict()) == list(before)
    torch.save(net.state_dict(), io.BytesIO())


@every
@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])  # noqa: S301
@pytest.mark.parametrize("recording", [False, True])
def test_a_copy_is_free_of_the_engine(kind, way, recording, net, batch):
    rows = gradients(net, ce, batch, 6)
    engine = kind(net, trained(net))
    if recording:
        engine.start()
    other = way(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    loss = ce(other, *batch)
    assert not torch.equal(loss, ce(net, *batch))
    loss.backward()
    assert all(p.grad.any() for p in other.parameters())
    way(other)
    recorded(engine, ce, batch)
    assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)
    engine.close()
    assert torch.equal(ce(other, *batch), loss)
    check(kind, way(net), ce, batch)


@every
def test_forward_hooks_of_others_are_kept(kind, net, batch):
    net.head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    net.head.register_forward_hook(lambda module, args, output: output.tanh())
    check(kind, net, ce, batch)


def test_two_engines_on_one_module(net):
    first = BookKeeping(net, trained(net))
    with pytest.raises(UnsupportedLayer, match="another engine"):
        BookKeeping(net, trained(net))
    first.close()
    BookKeeping(net, trained(net))


@every
def test_eval_mode(kind, net, batch):
    check(kind, net.eval(), ce, batch)


@every
def test_packed_sequences_are_refused(kind):
    module = DPLSTM(3, 4, batch_first=True)
    engine = kind(module, trained(module))
    engine.start()
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 3), torch.tensor([5, 5]), batch_first=True)
    with pytest.raises(RowsMismatch, match="packed"):
        module(packed)


@every
def test_a_forward_pass_that_the_loss_does_not_depend_on(kind, net, batch):
    rows = gradients(net, ce, batch, 6)
    engine = kind(net, trained(net))
    engine.start()
    loss, _ = ce(net, *batch), ce(net, *(x[:2] for x in batch))
    engine.arm()
    loss.backward()
    assert_near(engine.clipped_sum(6, 0.5, Flat()), exact(rows, 0.5, Flat()), 1e-5)


@every
def test_a_second_pass_of_fewer_rows(kind, net, batch):
    engine = kind(net, trained(net))
    recorded(engine, lambda module, x, y: ce(module, x, y) + ce(module, x[:1], y[:1]), batch)
    with pytest.raises(RowsMismatch, match="1 rows in a batch of 6|with 1 rows"):
        engine.clipped_sum(6, 0.5, Flat())


def bypasses() -> dict:
    def functional(module, x, y):
        return F.cross_entropy(F.linear(module.body(x), module.head.weight), y)

    def penalty(module, x, y):
        return ce(module, x, y) + module.head.weight.square().sum()

    return {"functional": functional, "penalty": penalty}


@pytest.mark.parametrize("name", bypasses())
def test_book_keeping_refuses_gradients_that_bypass_its_layers(name, net, batch):
    engine = BookKeeping(net, trained(net))
    recorded(engine, bypasses()[name], batch)
    with pytest.raises(RowsMismatch, match=r"reached head\.weight"):
        engine.clipped_sum(6, 1.0, Flat())


def test_book_keeping_refuses_the_loss_of_a_paused_pass(net, batch):
    engine = BookKeeping(net, trained(net))
    engine.start()
    with engine.paused():
        clean = ce(net, *batch)
    loss = clean + ce(net, *batch)
    engine.arm()
    loss.backward()
    with pytest.raises(RowsMismatch, match=r"paused\(\)"):
        engine.clipped_sum(6, 1.0, Flat())


def test_book_keeping_leaves_zeros_in_grad(net, batch):
    engine = BookKeeping(net, trained(net))
    recorded(engine, ce, batch)
    assert all(p.grad is not None and p.grad.shape == p.shape and not p.grad.any() for p in net.parameters())


def test_book_keeping_leaves_what_was_in_grad(net, batch):
    engine = BookKeeping(net, trained(net))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    recorded(engine, ce, batch)
    engine.clipped_sum(6, 1.0, Flat())
    assert all((p.grad == 1).all() for p in net.parameters())


def test_layers_say_how_their_gradients_are_told(net, batch):
    engine = BookKeeping(net, trained(net))
    names = ["body.0", "body.1", "body.3", "body.4", "head"]
    assert engine.layers == dict.fromkeys(names, "not seen")
    recorded(engine, ce, batch)
    engine.clipped_sum(6, 1.0, Flat())
    assert list(engine.layers.values()) == ["instantiate", "instantiate", "instantiate", "vmap", "ghost"]
