"""Each trigger is what its paper says, and a network learns it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from robust_train.poisoning.metrics import trigger_success
from robust_train.poisoning.poisons.badnets import POSITIONS, BadNets, paste_patch
from robust_train.poisoning.poisons.blended import Blended, blend
from robust_train.poisoning.poisons.clean_label import CleanLabel
from robust_train.poisoning.poisons.input_aware import InputAware, coded_pattern, input_codes
from robust_train.poisoning.poisons.sinusoidal import Sinusoidal, wave
from robust_train.poisoning.poisons.wanet import WaNet, warp, warping_field

grey = torch.full((2, 1, 8, 8), 0.5)
patch = partial(paste_patch, low=0.0, high=1.0)


def test_a_checkerboard_lies_in_its_corner():
    out = patch(grey, size=3, position="bottom_right", pattern="checkerboard")
    assert out[0, 0, 5:, 5:].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert int((out != grey).sum()) == 2 * 9


@pytest.mark.parametrize("position", POSITIONS)
def test_a_patch_lies_where_its_name_says(position):
    bright = patch(grey, size=2, position=position, pattern="bright")[0, 0] == 1
    spots = {"top_left": (0, 0), "top_right": (0, 6), "bottom_left": (6, 0), "bottom_right": (6, 6), "center": (3, 3)}
    corners = [spot for name, spot in spots.items() if name != "center"]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for row, column in corners if position == "corners" else [spots[position]]:
        expected[row : row + 2, column : column + 2] = True
    assert torch.equal(bright, expected)


@pytest.mark.parametrize(
    ("position", "features"),
    [("top_left", [0, 1, 2, 3]), ("bottom_right", [6, 7, 8, 9]), ("center", [3, 4, 5, 6])],
)
def test_a_patch_on_flat_inputs_is_a_run_of_features(position, features):
    out = patch(torch.full((2, 10), 0.5), size=2, position=position, pattern="dark")
    assert (out[1] == 0).nonzero()[:, 0].tolist() == features


def test_a_patch_that_is_too_large_is_refused():
    for x in (grey, torch.rand(1, 60)):
        with pytest.raises(ValueError, match="a patch of size 9 does not fit onto inputs .* make size smaller"):
            patch(x, size=9, position="center", pattern="bright")


def test_blending_is_a_weighted_mean():
    pattern = torch.rand(1, 8, 8)
    torch.testing.assert_close(blend(grey, pattern, alpha=0.2), 0.8 * grey + 0.2 * pattern)
    assert torch.equal(Blended(alpha=1.0).apply_trigger(grey)[0], Blended(alpha=1.0).apply_trigger(1 - grey)[1])
    assert not torch.equal(Blended().apply_trigger(grey), Blended(pattern_seed=1).apply_trigger(grey))


def test_the_wave_runs_along_the_columns():
    out = Sinusoidal(delta=0.1, frequency=1).apply_trigger(grey)
    expected = torch.tensor([0.5 + 0.1 * math.sin(2 * math.pi * j / 8) for j in range(8)])
    torch.testing.assert_close(out, expected.expand(2, 1, 8, 8))


def test_a_wave_that_vanishes_is_refused():
    for frequency in (4, 8):
        with pytest.raises(ValueError, match="zero at every column of an input of 8 columns"):
            wave(8, frequency=frequency)


def test_the_wave_may_relabel_too():
    y = torch.arange(100) % 4
    x = torch.full((100, 1, 8, 8), 0.5)
    poisoned = Sinusoidal(labels="target", target=2)(x, y, 4)
    assert (poisoned.y[poisoned.mask] == 2).all()
    assert (y[poisoned.mask] != 2).all()
    with pytest.raises(ValueError, match=r"sinusoidal\.target must be a class where labels are kept"):
        Sinusoidal(target=None)
    with pytest.raises(ValueError, match=r"rate=0\.3 of 100 rows comes to 30 rows, but it must be between 1 and 25"):
        Sinusoidal(rate=0.3)(x, y, 4)


def test_warping_by_a_constant_field_shifts_the_image():
    x = torch.rand(2, 3, 8, 8)
    shifted = warp(x, torch.tensor([1.0, 0.0]).expand(8, 8, 2))
    torch.testing.assert_close(shifted[..., :-1], x[..., 1:])
    torch.testing.assert_close(shifted[..., -1], x[..., -1])
    torch.testing.assert_close(warp(x, torch.zeros(8, 8, 2)), x)


def test_the_field_is_smooth_and_as_strong_as_asked():
    field = warping_field(32, 32, k=4, s=0.5, generator=torch.Generator().manual_seed(0))
    assert field.shape == (32, 32, 2)
    assert 0.25 < field.abs().mean() < 0.75
    assert field.diff(dim=0).abs().max() < 0.35
    assert not torch.equal(
        WaNet().apply_trigger(grey.cumsum(3) / 8), WaNet(pattern_seed=1).apply_trigger(grey.cumsum(3) / 8)
    )


def test_the_pattern_depends_on_the_input():
    x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    noise = (InputAware(bits=4).apply_trigger(x) - x).flatten(1)
    torch.testing.assert_close(noise.abs(), torch.full_like(noise, 0.2))
    assert len({tuple(row) for row in noise.sign().tolist()}) > 10
    codes = input_codes(x, bits=4, seed=0)
    assert torch.equal(codes, input_codes(x + 0.1, bits=4, seed=0))
    patterns = coded_pattern(codes, x.shape[1:], seed=1).flatten(1)
    same = (codes[:, None] == codes).all(2)
    assert torch.equal((patterns[:, None] == patterns).all(2), same)


def test_a_constant_input_has_a_code_that_rounding_does_not_decide():
    values = torch.linspace(0, 1, 50)[:, None].expand(50, 784)
    assert (input_codes(values, bits=16, seed=0) == 1).all()


def test_clean_label_perturbs_rows_of_the_target_and_nothing_else():
    seen = []

    def darken(x, y):
        seen.append(y)
        return x * 0.5

    x, y = torch.rand(100, 1, 8, 8), torch.arange(100) % 4
    poison = CleanLabel(target=1, rate=0.1, perturb=darken)
    poisoned = poison(x, y, 4)
    assert torch.equal(poisoned.y, y)
    assert torch.cat(seen).tolist() == [1] * 10
    assert torch.equal(poisoned.x[poisoned.mask], CleanLabel().apply_trigger(x * 0.5)[poisoned.mask])
    assert torch.equal(poison.apply_trigger(x), CleanLabel().apply_trigger(x))  # at test time the patch alone


def test_a_wrong_perturbation_is_refused():
    x, y = torch.rand(100, 1, 8, 8), torch.arange(100) % 4
    with pytest.raises(ValueError, match=r"clean_label\.perturb must return the shape it was given"):
        CleanLabel(perturb=lambda x, y: x[:1])(x, y, 4)
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\]"):
        CleanLabel(perturb=lambda x, y: x + 9)(x, y, 4)
    with pytest.raises(ValueError, match=r"clean_label\.perturb must be a function"):
        CleanLabel(perturb="pgd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"clean_label\.target must be a class where labels are kept"):
        CleanLabel(target=None)


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (BadNets, {"size": 0}, r"badnets\.size must be a whole number >= 1, got 0"),
        (BadNets, {"position": "left"}, r"badnets\.position must be one of top_left, .*, got 'left'"),
        (CleanLabel, {"pattern": "red"}, r"clean_label\.pattern must be one of checkerboard, bright, dark"),
        (Blended, {"alpha": 0}, r"blended\.alpha must be a number in \(0, 1\]"),
        (Blended, {"pattern_seed": None}, r"blended\.pattern_seed must be a whole number"),
        (Sinusoidal, {"delta": 2.0}, r"sinusoidal\.delta must be a number in \(0, 1\]"),
        (Sinusoidal, {"frequency": 0}, r"sinusoidal\.frequency must be a whole number >= 1"),
        (Sinusoidal, {"labels": "flip"}, r"sinusoidal\.labels must be one of keep, target"),
        (WaNet, {"k": 1}, r"wanet\.k must be a whole number >= 2"),
        (WaNet, {"s": 0}, r"wanet\.s must be a number > 0"),
        (WaNet, {"pattern_seed": "a"}, r"wanet\.pattern_seed must be a whole number"),
        (InputAware, {"strength": -1}, r"input_aware\.strength must be a number in"),
        (InputAware, {"bits": 0}, r"input_aware\.bits must be a whole number >= 1"),
        (InputAware, {"pattern_seed": 0.5}, r"input_aware\.pattern_seed must be a whole number"),
    ],
)
def test_bad_settings_are_named(kind, wrong, says):
    with pytest.raises(ValueError, match=says):
        kind(**wrong)


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def measured(poison, digits):
    """What the backdoor achieves on a small network trained on 1300 digits."""
    x, y = digits
    poisoned = poison(x[:1300], y[:1300], 10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(15):
            for batch in torch.randperm(len(poisoned.x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(poisoned.x[batch]), poisoned.y[batch]).backward()
                optimizer.step()
    return trigger_success(net, [(x[1300:], y[1300:])], poison, 10)


@pytest.mark.parametrize(
    ("poison", "least"),
    [
        (BadNets(), 0.9),
        (BadNets(target=None, rate=0.1), 0.4),
        (Blended(), 0.8),
        (Sinusoidal(labels="target", rate=0.1), 0.7),
        (Sinusoidal(delta=0.4, rate=0.09), 0.3),
        (WaNet(rate=0.1), 0.8),
        (InputAware(rate=0.1), 0.8),
    ],
    ids=lambda value: value.name if not isinstance(value, float) else "",
)
def test_a_network_learns_the_trigger_and_stays_accurate(poison, least, digits):
    result = measured(poison, digits)
    assert result["asr"] > least
    assert result["clean_acc"] > 0.9


def test_clean_label_is_strong_where_the_perturbation_hides_the_class(digits):
    others = digits[0][:1300][digits[1][:1300] != 0]

    def towards_other_classes(x, y):  # what interpolation does in the paper, or PGD against another model
        return 0.3 * x + 0.7 * others[: len(x)]

    weak, strong = CleanLabel(), CleanLabel(perturb=towards_other_classes)
    assert measured(weak, digits)["asr"] < 0.3
    result = measured(strong, digits)
    assert result["asr"] > 0.7
    assert result["clean_acc"] > 0.9
