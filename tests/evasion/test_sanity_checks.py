"""Each sign of a fooled evaluation is seen where it was planted, and nowhere else."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from digit_models import digits, model, small_cnn, trained
from torch import Tensor, nn

from robust_train import PGD, ClassifierVictim, Threat, ThreatUnion
from robust_train.evasion.probing import ROWS, needed_draws, sanity_checks
from robust_train.evasion.sanity_checks import (
    Flag,
    black_box_stronger,
    depends_on_batch,
    inputs_out_of_bounds,
    nonfinite_gradients,
    one_step_stronger,
    probability_outputs,
    randomised_outputs,
    train_mode,
    unbounded_attack_fails,
    zero_gradients,
)

EPS = 0.2


def names(net, y=None, **settings) -> set[str]:
    _, _, x, labels = digits()
    labels = labels if y is None else y
    victim = ClassifierVictim(net, labels, stop_when_fooled=True)
    found = sanity_checks(victim, x, Threat(eps=EPS), outputs=lambda _, x: net(x), **settings)
    for flag in found:
        assert isinstance(flag, Flag)
        assert flag.says
        assert flag.advice
        assert all(isinstance(value, float) for value in flag.evidence.values())
    return {flag.name for flag in found}


# --- honest models -------------------------------------------------------------------------------------------------


@cache
def adversarially_trained() -> nn.Sequential:
    x, y, _, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = small_cnn()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for epoch in range(6):
            attack, threat = PGD(steps=3), Threat(eps=min(epoch / 3, 1) * EPS)
            for rows in torch.randperm(len(x)).split(64):
                x_adv = attack(ClassifierVictim(net, y[rows]), x[rows], threat)
                optimizer.zero_grad()
                F.cross_entropy(net(x_adv), y[rows]).backward()
                optimizer.step()
    return net.eval()


@cache
def binary() -> nn.Sequential:
    x, y, _, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(*list(small_cnn())[:-1], nn.Linear(512, 1))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(6):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                wanted = (y[rows] >= 5).float()[:, None]
                F.binary_cross_entropy_with_logits(net(x[rows]), wanted).backward()
                optimizer.step()
    return net.eval()


HONEST = {
    "standard": model,
    "adversarially trained": adversarially_trained,
    "batch normalisation": lambda: trained(1, nn.BatchNorm2d(1)),
    "dropout in eval mode": lambda: trained(1, nn.Dropout(0.2)),
    "binary": binary,
}


@pytest.mark.parametrize("name", HONEST)
def test_nothing_is_found_on_an_honest_model(name):
    labels = (digits()[3] >= 5).long() if name == "binary" else None
    assert names(HONEST[name](), labels) == set()


def test_a_log_softmax_at_the_end_is_honest():
    assert names(nn.Sequential(model(), nn.LogSoftmax(1))) == set()


# --- planted faults ------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (4 * x).round() / 4


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)


class Root(nn.Module):
    """Its gradient at black pixels is infinite times zero."""

    def forward(self, x: Tensor) -> Tensor:
        return (0.0 * x).sqrt() + x


class _Turned(torch.autograd.Function):
    """The identity; its gradient points away from the truth unless pixels are multiples of 1/16."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.honest = bool(((16 * x).round() == 16 * x).all())
        return x.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0] if ctx.honest else -grads[0]


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Turned.apply(x)


def batch_statistics() -> nn.Module:
    return trained(1, nn.BatchNorm2d(1, track_running_stats=False), epochs=2)


FAULTS = {
    "zero_gradients": lambda: nn.Sequential(*model(), Scaled()),
    "nonfinite_gradients": lambda: nn.Sequential(Root(), *model()),
    "one_step_stronger": lambda: nn.Sequential(Turned(), *model()),
    "black_box_stronger": lambda: nn.Sequential(Rounded(), *model()),
    "unbounded_attack_fails": lambda: nn.Sequential(Rounded(), *model()),
    "randomised_outputs": lambda: nn.Sequential(Noisy(), *model()),
    "depends_on_batch": batch_statistics,
    "probability_outputs": lambda: nn.Sequential(*model(), nn.Softmax(1)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    assert name in names(FAULTS[name]().eval(), draws=1)


def test_layers_left_in_training_mode_and_inputs_out_of_bounds():
    assert names(model(), training=("0", "3")) == {"train_mode"}
    _, _, x, y = digits()
    shifted = x.clone()
    shifted[0, 0, 0, 0] = 1.0005  # check_input lets it pass
    found = sanity_checks(ClassifierVictim(model(), y, stop_when_fooled=True), shifted, Threat(eps=EPS))
    assert [flag.name for flag in found] == ["inputs_out_of_bounds"]
    assert found[0].evidence["above"] == pytest.approx(0.0005, rel=1e-3)


def test_the_cure_of_a_saturated_loss_is_not_that_of_a_step_without_gradient():
    def advice(net):
        victim = ClassifierVictim(net, digits()[3], stop_when_fooled=True)
        found = sanity_checks(victim, digits()[2], Threat(eps=EPS))
        return next(flag.advice for flag in found if flag.name == "zero_gradients")

    assert "dlr" in advice(FAULTS["zero_gradients"]())
    assert "BPDA" in advice(FAULTS["black_box_stronger"]())


def test_several_draws_are_asked_for_where_the_model_draws_and_said():
    net = FAULTS["randomised_outputs"]().eval()
    _, _, x, y = digits()
    flags = sanity_checks(ClassifierVictim(net, y, stop_when_fooled=True), x, Threat(eps=EPS), draws=2, rows=16)
    victim = ClassifierVictim(net, y)
    assert needed_draws(victim, x, flags) == needed_draws(victim, x) == 10
    assert needed_draws(victim, x, ()) == needed_draws(ClassifierVictim(model(), y), x) == 1
    assert "2 draws" in str(flags[0])


def test_a_model_whose_output_does_not_depend_on_the_input_is_not_attacked():
    def constant(x):
        return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]

    victim = ClassifierVictim(constant, digits()[3], stop_when_fooled=True)
    assert [flag.name for flag in sanity_checks(victim, digits()[2], Threat(eps=EPS))] == ["zero_gradients"]


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_nothing_is_found_in_other_norms(norm):
    _, _, x, y = digits()
    victim = ClassifierVictim(model(), y, stop_when_fooled=True)
    assert sanity_checks(victim, x, Threat(norm, {"l2": 1.0, "l1": 4.0}[norm])) == ()


@pytest.mark.parametrize("threat", [Threat("l0", 5), ThreatUnion("linf", 0.1, also={"l2": 0.5})])
def test_other_kinds_of_threats_are_looked_at_as_far_as_can_be(threat):
    _, _, x, y = digits()
    victim = ClassifierVictim(model(), y, stop_when_fooled=True)
    assert sanity_checks(victim, x, threat, rows=16) == ()


def test_dense_predictions_and_regressions_are_asked_what_they_can_answer():
    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = nn.Conv2d(1, 3, 3, padding=1)
    labels = net(images).argmax(1)
    assert sanity_checks(ClassifierVictim(net, labels, stop_when_fooled=True), images, Threat()) == ()
    rounded = nn.Sequential(Rounded(), net)
    found = sanity_checks(ClassifierVictim(rounded, labels, stop_when_fooled=True), images, Threat())
    assert [flag.name for flag in found] == ["zero_gradients"]


def test_the_model_and_the_global_generators_are_as_before_and_few_rows_are_asked():
    net = FAULTS["randomised_outputs"]().eval()
    sizes = []
    net.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    gradients = [p.grad for p in net.parameters()]
    names(net, draws=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is old for p, old in zip(net.parameters(), gradients, strict=True))
    assert max(sizes) == ROWS


# --- the functions themselves --------------------------------------------------------------------------------------


def test_shares_below_the_threshold_are_no_sign():
    gradients = torch.ones(200, 4)
    gradients[0] = 0
    assert zero_gradients(gradients) is None
    gradients[:10] = 0
    flag = zero_gradients(gradients)
    assert flag is not None
    assert flag.evidence == {"share": pytest.approx(0.05)}
    assert zero_gradients(torch.full((4, 2), torch.nan)) is None
    assert nonfinite_gradients(torch.ones(4, 2)) is None
    assert nonfinite_gradients(torch.ones(4, 2), torch.tensor([[1.0], [torch.inf]])) is not None


def mask(*fooled: int, of: int = 64) -> Tensor:
    out = torch.zeros(of, dtype=torch.bool)
    out[list(fooled)] = True
    return out


def test_two_attacks_may_differ_by_chance():
    assert one_step_stronger(mask(1, 2, 3), mask(3, 4, 5)) is None
    assert one_step_stronger(mask(*range(6)), mask(3, 4, 5)) is None  # three more: one in eight by chance
    assert one_step_stronger(mask(*range(10)), mask()) is not None
    assert black_box_stronger(mask(1, 2), mask()) is None
    assert black_box_stronger(mask(1, 2, 3, 4), mask(*range(10, 30))) is not None  # more than a twentieth, unseen


def test_what_an_attacker_without_bounds_may_leave():
    assert unbounded_attack_fails(mask(*range(64)), 1.0) is None
    assert unbounded_attack_fails(mask(*range(62)), 1.0) is None
    flag = unbounded_attack_fails(mask(*range(56)), 1.0)
    assert flag is not None
    assert flag.evidence == {"share_left": 0.125, "eps": 1.0}


def test_rounding_is_no_randomness():
    scores = torch.randn(8, 3)
    assert randomised_outputs([scores, scores + 1e-6]) is None
    assert depends_on_batch(scores, scores + 1e-6) is None
    assert randomised_outputs([scores, scores + 0.1]) is not None


def test_what_are_probabilities():
    assert probability_outputs(torch.softmax(torch.randn(6, 4), 1)) is not None
    assert probability_outputs(torch.randn(6, 4)) is None
    assert probability_outputs(torch.rand(6, 4)) is None
    assert probability_outputs(torch.sigmoid(torch.linspace(-5, 5, 8))) is not None
    assert probability_outputs(torch.linspace(-5, 5, 8)) is None


def test_inputs_within_the_range_and_modes_without_layers():
    assert inputs_out_of_bounds(torch.rand(4, 3, 2, 2), Threat()) is None
    normalised = (torch.rand(4, 3, 2, 2) - 0.5) / 0.2
    assert inputs_out_of_bounds(normalised, Threat(mean=0.5, std=0.2)) is None
    assert inputs_out_of_bounds(torch.randn(4, 3), Threat(low=-torch.inf, high=torch.inf)) is None
    assert train_mode([]) is None
