"""Attacks that keep to limits of their own: rotation and translation, and a patch; and universal perturbations."""

from __future__ import annotations

import math

import pytest
import torch
from digit_models import accuracy, digits, model
from torch import nn

from robust_train import (
    EOT,
    PGD,
    ClassifierVictim,
    Patch,
    Spatial,
    Threat,
    UniformNoise,
    Universal,
    WorstCase,
    evaluate,
    save_universal,
    universal_perturbation,
)
from robust_train.evasion.attacks.base import what_holds
from robust_train.evasion.attacks.spatial import moved, spatial
from robust_train.evasion.attacks.universal import apply_universal, load_universal

THREAT = Threat(eps=0.1)


@pytest.fixture(scope="module")
def images():
    _, _, x, y = digits()
    return x[:80], y[:80]


def attacked(attack, x, y, threat=THREAT, net=None, **victim):
    victim = ClassifierVictim(model() if net is None else net, y, **victim)
    return attack(victim, x, threat, torch.Generator().manual_seed(0))


# --- rotation and translation -----------------------------------------------------------------------------------------


def test_whole_turns_and_whole_pixels_move_exactly():
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = moved(x, torch.tensor([90.0]), torch.zeros(1, 2), THREAT)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    shifted = moved(x, torch.zeros(1), torch.tensor([[2.0, -1.0]]), THREAT)  # right and up
    torch.testing.assert_close(shifted[..., :7, 2:], x[..., 1:, :6], atol=1e-5, rtol=0)
    assert float(shifted[..., 7, :].abs().max() + shifted[..., :2].abs().max()) < 1e-5
    both = moved(x, torch.tensor([90.0]), torch.tensor([[2.0, -1.0]]), THREAT)  # rotated first
    torch.testing.assert_close(both[..., :7, 2:], turned[..., 1:, :6], atol=1e-5, rtol=0)


def test_an_oblong_image_is_not_stretched():
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 2, 4:7] = 1  # from the middle to the right
    turned = moved(x, torch.tensor([90.0]), torch.zeros(1, 2), THREAT)
    torch.testing.assert_close(turned[0, 0, :3, 4], torch.ones(3), atol=1e-5, rtol=0)


def test_normalised_images_are_filled_with_the_lowest_pixel_value():
    threat = Threat(low=0.2, mean=(0.5, 0.1), std=(0.5, 0.25))
    x = threat.from_pixels(0.2 + 0.8 * torch.rand(2, 2, 8, 8))
    out = threat.to_pixels(moved(x, torch.tensor([0.0, 45.0]), torch.tensor([[8.0, 0.0], [0.0, 0.0]]), threat))
    torch.testing.assert_close(out[0], torch.full((2, 8, 8), 0.2))
    torch.testing.assert_close(out[1, :, 0, 0], torch.full((2,), 0.2))


def test_it_finds_what_noise_does_not_and_a_grid_finds_as_much(images):
    x, y = images
    small = {"rotation": 30, "translation": 1.5}
    clean, found = accuracy(model(), x, y), {}
    for name, attack in {"ten": Spatial(**small), "grid": Spatial(**small, grid=[11, 5])}.items():
        found[name] = accuracy(model(), attacked(attack, x, y), y)
    assert found["ten"] < clean - 0.3
    assert found["grid"] <= found["ten"]
    assert accuracy(model(), attacked(UniformNoise(), x, y), y) > clean - 0.1


def test_examples_that_are_fooled_leave_and_nothing_else_changes(images):
    x, y = images
    calls = []

    def counting(inputs):
        calls.append(len(inputs))
        return model()(inputs)

    all_of_them = attacked(Spatial(), x, y, net=counting)
    assert calls == [80] * 11
    calls.clear()
    leaving = attacked(Spatial(), x, y, net=counting, stop_when_fooled=True)
    assert sum(calls) < 11 * 80
    assert accuracy(model(), leaving, y) == accuracy(model(), all_of_them, y)


def test_where_only_the_mean_loss_is_known_the_worst_of_the_batch_is_kept(images):
    x, y = images

    class Mean(ClassifierVictim):
        def loss(self, inputs):
            return super().loss(inputs).mean()

    out = Spatial()(Mean(model(), y), x, THREAT)
    assert ClassifierVictim(model(), y).loss(out).mean() > ClassifierVictim(model(), y).loss(x).mean() + 0.5


# --- a patch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [None, (1, 4)])
def test_a_patch_changes_one_square_and_no_more(images, place):
    x, y = images
    out = attacked(Patch(size=3, place=place, steps=10), x, y)
    changed = (out != x).any(1)
    for mask in changed:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert int(rows.max() - rows.min()) < 3
        assert int(columns.max() - columns.min()) < 3
        if place is not None:
            assert int(rows.min()) >= 1
            assert int(columns.min()) >= 4
    corners = {(int(m.any(1).nonzero()[0]), int(m.any(0).nonzero()[0])) for m in changed}
    assert len(corners) > 10 or place is not None


def test_a_larger_patch_fools_more_and_gradients_find_it(images):
    x, y = images
    found = [accuracy(model(), attacked(Patch(size=s, place=(2, 2), steps=20), x, y), y) for s in (1, 2, 4)]
    assert found[0] > found[1] > found[2]
    random = accuracy(model(), attacked(Patch(size=4, place=(2, 2), steps=1, step_size=1e-9), x, y), y)
    assert found[2] < random - 0.1
    more = accuracy(model(), attacked(Patch(size=2, steps=10, restarts=4), x, y), y)
    assert more < accuracy(model(), attacked(Patch(size=2, steps=10), x, y), y)


def test_fooled_examples_leave_the_patch_attack(images):
    x, y = images
    out = attacked(Patch(size=4, steps=10, restarts=2), x, y, stop_when_fooled=True)
    assert accuracy(model(), out, y) <= accuracy(model(), attacked(Patch(size=4, steps=10), x, y), y)


# --- what holds is said -----------------------------------------------------------------------------------------------


def test_the_threat_is_described_with_what_holds_instead(images):
    x, y = images
    attacks = {"pgd": PGD(steps=2), "spatial": Spatial(), "patch": Patch(size=3, steps=2)}
    said = (
        "Linf ball of radius 0.1 in [0.0, 1.0]; Spatial instead: rotation up to 30°, translation up to 3 px; "
        "Patch instead: one square of 3 x 3 px, anywhere"
    )
    assert what_holds(attacks.values(), THREAT) == said
    assert what_holds([PGD()], THREAT) == THREAT.describe()
    assert evaluate(model(), [(x[:20], y[:20])], THREAT, attacks).threat == said


def test_attacks_around_them_keep_their_limits(images):
    x, y = images
    both = WorstCase([PGD(steps=3), Spatial()])
    assert both.limits == "rotation up to 30°, translation up to 3 px; or the ball"
    assert EOT(Spatial()).limits == Spatial().limits
    assert WorstCase([PGD()]).limits is None
    out = attacked(both, x, y)
    assert float(THREAT.size(out, x).max()) > 0.5
    assert accuracy(model(), out, y) <= accuracy(model(), attacked(Spatial(), x, y), y)
    ball = attacked(WorstCase([PGD(steps=3), UniformNoise()]), x, y)
    assert float(THREAT.size(ball, x).max()) <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize("attack", [Spatial(), Patch(size=2, steps=2)], ids=lambda a: type(a).__name__)
def test_features_that_cannot_change_do_not(attack, images):
    x, y = images
    threat = Threat(eps=0.1, mutable=(False,))
    assert torch.equal(attacked(attack, x, y, threat), x)


# --- universal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 1.5), ("l1", 8.0)])
def test_one_perturbation_for_all_fools_on_new_data_more_than_noise_does(norm, eps, tmp_path):
    x, y, new, truth = digits()
    threat = Threat(norm, eps)
    loader = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 600, 100)]
    net = model()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    delta = universal_perturbation(net, loader, threat, epochs=6)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(delta, universal_perturbation(net, loader, threat, epochs=6))
    assert delta.shape == (1, 8, 8)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    assert float(torch.linalg.vector_norm(delta.flatten(), ord=order)) <= eps * (1 + 1e-5)
    save_universal(tmp_path / "u.safetensors", delta, threat)
    attack = Universal(str(tmp_path / "u.safetensors"))
    out = attack(ClassifierVictim(net, truth), new, threat)
    noise = attacked(UniformNoise(), new, truth, threat)
    assert accuracy(net, out, truth) < accuracy(net, noise, truth) - 0.05
    assert bool((threat.size(out, new) <= eps * (1 + 1e-6)).all())


def test_a_universal_perturbation_is_in_pixels_whatever_the_normalisation(tmp_path):
    x, y, *_ = digits()
    plain, threat = Threat(eps=0.2), Threat(eps=0.2, mean=0.3, std=0.5)
    loader = [(x[:200], y[:200])]
    scaled = [(threat.from_pixels(x[:200]), y[:200])]

    class Undo(nn.Module):
        def forward(self, inputs):
            return model()(threat.to_pixels(inputs))

    a, b = (
        universal_perturbation(net, data, t) for net, data, t in ((model(), loader, plain), (Undo(), scaled, threat))
    )
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    out = threat.to_pixels(apply_universal(scaled[0][0], b, threat))
    torch.testing.assert_close(out, apply_universal(x[:200], a, plain), atol=1e-4, rtol=0)


def test_a_universal_file_is_looked_at(tmp_path, images):
    x, y = images
    path = tmp_path / "u.safetensors"
    with pytest.raises(ValueError, match="universal.path is missing: find a perturbation with universal_perturbation"):
        attacked(Universal(), x, y)
    with pytest.raises(ValueError, match="u.safetensors: No such file"):
        attacked(Universal(str(path)), x, y)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="no safetensors file"):
        attacked(Universal(str(path)), x, y)
    save_universal(path, torch.zeros(3, 8, 8), THREAT)
    assert torch.equal(load_universal(path), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"is for inputs of shape \(3, 8, 8\), got \(1, 8, 8\)"):
        attacked(Universal(str(path)), x, y)
    with pytest.raises(ValueError, match="the loader is empty"):
        universal_perturbation(model(), [], THREAT)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Spatial(rotation=200), "spatial.rotation must be a number >= 0 and <= 180, got 200"),
        (lambda: Spatial(translation=-1), "spatial.translation must be a number >= 0, got -1"),
        (lambda: Spatial(rotation=0, translation=0), "both 0"),
        (lambda: Spatial(tries=0), "spatial.tries must be a whole number >= 1, got 0"),
        (lambda: Spatial(grid=[3]), r"spatial.grid must be \[angles, shifts\] or null"),
        (lambda: Spatial(grid=[3, 0]), r"spatial.grid\[1\] must be a whole number >= 1, got 0"),
        (lambda: Patch(size=0), "patch.size must be a whole number >= 1, got 0"),
        (lambda: Patch(place=(1, -1)), r"patch.place must be \[row, column\] or null"),
        (lambda: Patch(step_size=0), "patch.step_size must be > 0"),
        (lambda: Universal(path=3), "universal.path must be the path of a file"),
    ],
)
def test_bad_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_inputs_that_are_no_images_are_refused(images):
    x, y = images
    for attack in (Spatial(), Patch()):
        with pytest.raises(ValueError, match=r"images \(B, C, H, W\)"):
            attacked(attack, x.flatten(1), y)
    with pytest.raises(ValueError, match="that hold one square of 9 x 9 px, anywhere"):
        attacked(Patch(size=9), x, y)
    endless = Threat(eps=0.1, low=-math.inf, high=math.inf)
    for attack in (Spatial(), Patch()):
        with pytest.raises(ValueError, match="threat.low"):
            attacked(attack, x, y, endless)
    with pytest.raises(ValueError, match="take.* steps in the norms"):
        universal_perturbation(model(), [(x, y)], Threat("l0", 3))


def test_the_pure_function_needs_no_settings(images):
    x, y = images
    assert spatial(ClassifierVictim(model(), y), x, THREAT).shape == x.shape
