"""MI-FGSM, and examples that are crafted on one model and tried on another."""

from __future__ import annotations

import pytest
import torch
from digit_models import accuracy, digits, model, small_cnn
from torch import nn

from robust_train import FGSM, MIFGSM, PGD, ClassifierVictim, Threat
from robust_train.evasion.attacks.mi_fgsm import resized_and_padded, smoothed
from robust_train.evasion.attacks.transfer import Transfer, load_weights


def crafted(attack, source, x, y, threat):
    return Transfer(source, attack)(ClassifierVictim(source, y), x, threat)


# --- MI-FGSM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.15, 0.2])
def test_it_transfers_better_than_fgsm(eps):
    _, _, x, y = digits()
    left = {
        name: sum(accuracy(model(b), crafted(attack, model(a), x, y, Threat(eps=eps)), y) for a, b in ((1, 2), (2, 1)))
        for name, attack in {
            "fgsm": FGSM(),
            "mi": MIFGSM(),
            "di": MIFGSM(diversity=0.7),
            "ti": MIFGSM(kernel=3),
        }.items()
    }
    assert max(left["mi"], left["di"], left["ti"]) < left["fgsm"]


def test_the_steps_are_those_of_the_paper(net, images, labels):
    steps, eps, decay = 4, 0.2, 0.7
    x_adv, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(nn.functional.cross_entropy(net(x_adv), labels, reduction="sum"), x_adv)
        momentum = decay * momentum + grad / grad.abs().mean((1, 2, 3), keepdim=True)
        x_adv = (x_adv.detach() + eps / steps * momentum.sign()).clamp(0, 1)
    ours = MIFGSM(steps=steps, decay=decay)(ClassifierVictim(net, labels), images, Threat(eps=eps))
    torch.testing.assert_close(ours, x_adv)


def test_fooled_examples_leave(net, images):
    labels = net(images).argmax(1)
    sizes = []
    handle = net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    victim = ClassifierVictim(net, labels, stop_when_fooled=True)
    x_adv = MIFGSM(steps=20)(victim, images, Threat(eps=0.5))
    handle.remove()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < len(images)
    assert float(victim.score(x_adv).sum()) < len(images)


def test_images_are_shrunk_and_put_on_a_black_canvas_whatever_the_normalisation():
    x = torch.full((2, 3, 40, 40), 0.8)
    threat = Threat(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    seen = set()
    for seed in range(8):
        out = resized_and_padded(threat.from_pixels(x), threat, torch.Generator().manual_seed(seed))
        pixels = threat.to_pixels(out)
        white = (pixels - 0.8).abs() < 1e-5
        assert bool((white | (pixels.abs() < 1e-5)).all())
        rows = int(white[0, 0].any(1).sum())
        assert 36 <= rows <= 40
        seen.add(rows)
    assert len(seen) > 2


def test_smoothing_keeps_a_constant_gradient_and_spreads_a_point():
    grad = torch.zeros(1, 2, 9, 9)
    grad[0, 1, 4, 4] = 1.0
    out = smoothed(grad, 5)
    assert float(out[0, 0].abs().max()) == 0
    assert float(out[0, 1].sum()) == pytest.approx(1.0)
    assert float(out[0, 1, 4, 4]) == float(out.max())
    assert float(smoothed(torch.ones(1, 1, 9, 9), 5)[0, 0, 4, 4]) == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"diversity": 0.5}, {"kernel": 3}])
def test_tables_are_refused_where_images_are_needed(settings):
    victim = ClassifierVictim(nn.Linear(5, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"need images \(B, C, H, W\), got inputs \(3, 5\): set both to 0"):
        MIFGSM(**settings)(victim, torch.rand(3, 5), Threat(eps=0.1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"step_size": 0}, "step_size must be > 0"),
        ({"decay": -1}, "decay must be a number >= 0, got -1"),
        ({"diversity": 1.5}, r"diversity must be in \[0, 1\], got 1.5"),
        ({"kernel": 4}, "kernel must be 0 or an odd whole number, got 4"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=f"mi_fgsm.{says}"):
        MIFGSM(**settings)


# --- transfer ---------------------------------------------------------------------------------------------------------


def test_the_model_under_attack_is_never_called(images, labels, net):
    def untouchable(x):
        raise AssertionError("called")

    x_adv = Transfer(net, PGD(steps=2))(ClassifierVictim(untouchable, labels), images, Threat(eps=0.1))
    assert not torch.equal(x_adv, images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_surrogate_is_left_as_it_was_and_may_be_of_another_dtype(net, images, labels, dtype):
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    out = Transfer(net, FGSM())(ClassifierVictim(net, labels), images.to(dtype), Threat(eps=0.1))
    assert out.dtype == dtype
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_on_itself_it_is_the_attack(net, images, labels):
    victim, attack = ClassifierVictim(net, labels), MIFGSM(steps=3)
    assert torch.equal(Transfer(net, attack)(victim, images, Threat(eps=0.1)), attack(victim, images, Threat(eps=0.1)))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.auxiliary, self.network = nn.Linear(3, 3), small_cnn()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_are_read_from_a_state_dict_or_a_checkpoint(tmp_path, checkpoint, wrapped):
    saved = Wrapper() if wrapped else small_cnn()
    state = saved.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if checkpoint else state, tmp_path / "weights.pt")
    surrogate = small_cnn()
    loaded = Transfer(surrogate, FGSM(), str(tmp_path / "weights.pt")).surrogate
    wanted = saved.network if isinstance(saved, Wrapper) else saved
    for key, value in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert not torch.equal(surrogate[0].weight, wanted[0].weight)  # the caller's module stays as it is


def test_weights_that_do_not_fit_or_hold_code_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not hold the weights of a Sequential of these settings"):
        load_weights(small_cnn(), tmp_path / "other.pt")
    torch.save(small_cnn(), tmp_path / "pickled.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_weights(small_cnn(), tmp_path / "pickled.pt")


def test_only_modules_and_attacks_are_taken():
    with pytest.raises(TypeError, match=r"transfer.surrogate must be a torch module"):
        Transfer("resnet", PGD())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"transfer.attack must be an attack"):
        Transfer(nn.Identity(), "pgd")  # type: ignore[arg-type]
