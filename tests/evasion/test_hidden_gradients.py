"""EOT and BPDA: models that draw at random, and models with steps that have no gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from digit_models import accuracy, digits, model, trained
from torch import nn

from robust_train import BPDA, EOT, FGSM, PGD, ClassifierVictim, Threat, WorstCase, evaluate
from robust_train.evasion.attacks.bpda import passed_through, straight_through, without_gradient
from robust_train.evasion.victim import input_gradient

# --- random models ----------------------------------------------------------------------------------------------------


class DropPixels(nn.Module):
    """Half of the pixels are dropped, also in eval mode."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.3 * torch.randn_like(x)


@pytest.fixture(scope="module")
def random_model():
    torch.set_num_threads(1)
    return trained(1, DropPixels(), epochs=12)


def test_eot_finds_what_pgd_misses_on_a_random_model(random_model):
    _, _, x, y = digits()
    x, y, threat = x[:200], y[:200], Threat(eps=0.15)
    victim = ClassifierVictim(random_model, y)
    left = {
        name: accuracy(random_model, attack(victim, x, threat), y, draws=20)
        for name, attack in {"pgd": PGD(steps=10), "eot": EOT(PGD(steps=10), samples=10)}.items()
    }
    assert left["eot"] < left["pgd"] - 0.05
    judged = ClassifierVictim(random_model, y, stop_when_fooled=True)  # an unlucky draw is no lasting success
    assert left["eot"] < accuracy(random_model, PGD(steps=10)(judged, x, threat), y, draws=20) - 0.2
    attack = EOT(PGD(steps=10), samples=10)
    assert accuracy(random_model, attack(judged, x, threat), y, draws=20) == pytest.approx(left["eot"], abs=0.02)


def test_the_gradient_is_the_mean_over_new_draws(images, labels, net):
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            noise = torch.randn_like(x)
            seen.append(noise)
            return net(x + 0.1 * noise)

    EOT(FGSM(), samples=5)(ClassifierVictim(Watched(), labels), images, Threat(eps=0.1))
    assert len(seen) == 5
    assert len({float(noise.sum()) for noise in seen}) == 5
    gradients = []
    for noise in seen:
        fixed = ClassifierVictim(lambda x, noise=noise: net(x + 0.1 * noise), labels)
        gradients.append(input_gradient(fixed, images)[0])
    want = (images + 0.1 * torch.stack(gradients).mean(0).sign()).clamp(0, 1)
    found = EOT(FGSM(), samples=5)(ClassifierVictim(Watched(), labels), images, Threat(eps=0.1))
    torch.testing.assert_close(found, want)


def test_the_generator_alone_decides_what_the_model_draws(images, labels, net):
    victim = ClassifierVictim(nn.Sequential(Noise(), net), labels)

    def run(seed):
        return EOT(PGD(steps=3), samples=3)(victim, images, Threat(eps=0.1), torch.Generator().manual_seed(seed))

    first = run(0)
    torch.rand(7)
    state = torch.get_rng_state()
    assert torch.equal(first, run(0))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, run(1))


def test_without_randomness_it_is_the_attack_within(images, labels, net):
    victim, attack = ClassifierVictim(net, labels), PGD(steps=4, random_start=False)
    torch.testing.assert_close(
        EOT(attack, samples=4)(victim, images, Threat(eps=0.1)), attack(victim, images, Threat(eps=0.1))
    )


def test_it_composes_and_passes_on_what_the_attack_within_says(images, labels, net):
    inner = FGSM(noise=2.0, project=False)
    outer = EOT(BPDA(inner), samples=2)
    assert outer.reach == inner.reach
    assert outer.passes == 2 * (inner.passes + 0.5)
    assert not outer.starts_at_clean_input
    assert EOT(PGD(targeted="next")).needs == {"loss", "logits", "labels"}
    members = WorstCase([EOT(PGD(steps=2, targeted="next"), samples=2), BPDA(EOT(FGSM(), samples=2))])
    net.train()
    assert members(ClassifierVictim(net, labels), images, Threat(eps=0.1)).shape == images.shape


# --- steps without a gradient -----------------------------------------------------------------------------------------


class Quantise(nn.Module):
    def forward(self, x):
        return torch.round(x * 4) / 4


class Numpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy().round(1))


class Threshold(nn.Module):
    def forward(self, x):
        return (x > 0.5).to(x.dtype)


def test_bpda_breaks_a_rounding_layer_that_pgd_cannot():
    _, _, x, y = digits()
    net, threat = nn.Sequential(Quantise(), model()), Threat(eps=0.2)
    result = {
        name: evaluate(net, [(x[:200], y[:200])], threat, attack)
        for name, attack in {
            "pgd": PGD(steps=20),
            "found": BPDA(PGD(steps=20)),
            "named": BPDA(PGD(steps=20), modules=["0"]),
        }.items()
    }
    assert result["pgd"].robust_acc > 0.9
    assert result["found"].robust_acc < 0.1
    assert result["named"].robust_acc == result["found"].robust_acc


def test_the_forward_pass_stays_what_it_is_and_the_backward_pass_is_the_identitys():
    layer, x = Quantise(), torch.rand(3, 5, requires_grad=True)
    with passed_through([layer]):
        out = layer(x)
    assert torch.equal(out, layer(x))
    weights = torch.randn(3, 5)
    assert torch.equal(torch.autograd.grad(out, x, weights)[0], weights)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not torch.autograd.grad(layer(x).sum(), x)[0].any()


def test_layers_that_go_on_in_numpy_or_write_in_place_are_passed_too(images, labels, net):
    victim = ClassifierVictim(nn.Sequential(Numpy(), net), labels)
    with pytest.raises(RuntimeError, match="numpy"):
        PGD(steps=2)(victim, images, Threat(eps=0.2))
    attack = BPDA(PGD(steps=5), modules=lambda m: isinstance(m, Numpy))
    with torch.no_grad():
        assert float(victim.loss(attack(victim, images, Threat(eps=0.2))).mean()) > float(victim.loss(images).mean())
    x = torch.rand(2, 3)
    with passed_through([in_place := nn.Threshold(0.5, 0.0, inplace=True)]):
        in_place(x)
    assert float(x[x < 0.5].min()) > 0


def test_layers_without_a_gradient_are_found_also_behind_one_another(images, labels, net):
    layers = nn.Sequential(nn.Identity(), Quantise(), nn.BatchNorm2d(1), Threshold(), nn.ReLU(), net)
    victim = ClassifierVictim(layers, labels)
    with victim.undisturbed():
        assert without_gradient(victim, images) == [layers[1], layers[3]]
        assert without_gradient(ClassifierVictim(net, labels), images) == []
    layers.train()
    with victim.undisturbed():
        assert without_gradient(victim, images) == [layers[1], layers[3]]


def test_hooks_are_gone_after_an_exception(images, labels):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("the model broke")

    net = nn.Sequential(Quantise(), Broken())
    with pytest.raises(RuntimeError, match="the model broke"):
        BPDA(FGSM(), modules=["0"])(ClassifierVictim(net, labels), images, Threat(eps=0.1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_function_is_passed_by_straight_through(images, labels, net):
    victim = ClassifierVictim(lambda x: net(straight_through(Quantise(), x)), labels)
    grad, _, _ = input_gradient(victim, images)
    want, _, _ = input_gradient(ClassifierVictim(net, labels), Quantise()(images))
    torch.testing.assert_close(grad, want)
    with pytest.raises(ValueError, match="must return a tensor of its input's shape"):
        straight_through(lambda x: x[:, :2], torch.rand(2, 3))


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        (["nowhere"], "has no submodule 'nowhere'; it has: 0, 1"),
        (lambda m: False, "accepts no module of Sequential"),
        (["1.6"], r"Linear must return a tensor of its input's shape \(12, 128\), got \(12, 10\)"),
    ],
)
def test_what_cannot_be_passed_is_named(modules, says, images, labels, net):
    victim = ClassifierVictim(nn.Sequential(Quantise(), net), labels)
    with pytest.raises(ValueError, match=says):
        BPDA(FGSM(), modules=modules)(victim, images, Threat(eps=0.1))


def test_a_victim_that_is_a_function_has_no_modules(images, labels, net):
    with pytest.raises(ValueError, match="no torch module"):
        BPDA(FGSM())(ClassifierVictim(lambda x: net(x), labels), images, Threat(eps=0.1))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: EOT("pgd"), TypeError, "eot.attack must be an attack"),
        (lambda: EOT(PGD(), samples=0), ValueError, "eot.samples must be a whole number >= 1, got 0"),
        (lambda: BPDA("pgd"), TypeError, "bpda.attack must be an attack"),
        (lambda: BPDA(PGD(), modules="0"), TypeError, "bpda.modules must be a list of names"),
        (lambda: BPDA(PGD(), modules=[]), ValueError, "bpda.modules must hold names"),
    ],
)
def test_bad_settings_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
