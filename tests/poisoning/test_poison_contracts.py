"""What every poison of ``conf/poison/*.yaml`` promises. A new yaml is picked up by itself."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_train.config import build
from robust_train.hydra_plugin import config_dir, register
from robust_train.poisoning.poisons.backdoor import Backdoor, DecoyBackdoor
from robust_train.poisoning.poisons.badnets import BadNets
from robust_train.poisoning.poisons.base import Poison
from robust_train.poisoning.poisons.random_flips import RandomFlips

N, CLASSES = 120, 4
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (50,)]


def made(name: str) -> Poison:
    register()
    with initialize(version_base="1.3", config_path=None):
        mounts = "hydra.searchpath=[robust-train://,robust-train://robust_train]"
        return build(compose(overrides=[mounts, f"+poison={name}"]).poison)


NAMES = sorted(path.stem for path in (config_dir("conf") / "poison").glob("*.yaml"))
POISONS = {name: made(name) for name in NAMES}
BACKDOORS = {name: poison for name, poison in POISONS.items() if isinstance(poison, Backdoor)}
every = pytest.mark.parametrize("poison", POISONS.values(), ids=NAMES)
backdoor = pytest.mark.parametrize("poison", BACKDOORS.values(), ids=list(BACKDOORS))


def rows(shape=(1, 8, 8), dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(N, *shape, generator=generator).to(dtype), torch.arange(N) % CLASSES


def fits(poison: Poison, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or poison.name != "wanet"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every
def test_exactly_the_rate_is_poisoned_and_all_else_left_alone(poison, shape):
    x, y = rows(shape)
    if not fits(poison, shape):
        with pytest.raises(ValueError, match="choose another trigger"):
            poison(x, y, CLASSES)
        return
    before, state = (x.clone(), y.clone()), torch.get_rng_state()
    poisoned = poison(x, y, CLASSES)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(torch.get_rng_state(), state)

    count = round(poison.rate * N)
    assert poisoned.mask.dtype == torch.bool
    assert int(poisoned.mask.sum()) == count
    assert len(poisoned.x) == len(poisoned.y) == len(poisoned.mask) == N + count * poison.appends
    assert poisoned.x.shape[1:] == x.shape[1:]
    assert poisoned.x.dtype == x.dtype
    assert poisoned.y.dtype == torch.int64
    assert poisoned.x.amin() >= 0
    assert poisoned.x.amax() <= 1
    assert 0 <= poisoned.y.min() <= poisoned.y.max() < CLASSES
    untouched = ~poisoned.mask[:N]
    assert torch.equal(poisoned.x[:N][untouched], x[untouched])
    assert torch.equal(poisoned.y[:N][untouched], y[untouched])
    changed = (poisoned.x[:N] != x).flatten(1).any(1) | (poisoned.y[:N] != y)
    assert torch.equal(changed, poisoned.mask[:N])
    assert bool(torch.equal(poisoned.x[:N], x)) == (poison.relabels_only or poison.appends)


@every
def test_the_seed_decides(poison):
    x, y = rows()
    first, again, other = poison(x, y, CLASSES), poison(x, y, CLASSES), replace(poison, seed=1)(x, y, CLASSES)
    for field in ("x", "y", "mask"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not (torch.equal(first.x, other.x) and torch.equal(first.y, other.y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every
def test_other_precisions_are_kept(poison, dtype):
    x, y = rows(dtype=dtype)
    poisoned = poison(x, y, CLASSES)
    assert poisoned.x.dtype == dtype
    assert 0 <= poisoned.x.amin() <= poisoned.x.amax() <= 1


@pytest.mark.parametrize("poison", [p for p in POISONS.values() if hasattr(p, "low")], ids=lambda p: p.name)
def test_the_range_is_the_users(poison):
    x, y = rows()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], but range from .* set low and high"):
        poison(4 * x - 2, y, CLASSES)
    wide = replace(poison, low=-2.0, high=2.0)(4 * x - 2, y, CLASSES)
    assert -2 <= wide.x.amin() <= wide.x.amax() <= 2
    if poison.name != "out_of_distribution":  # rounds differently
        torch.testing.assert_close(wide.x, 4 * poison(x, y, CLASSES).x - 2)


@every
def test_it_travels_to_worker_processes(poison):
    assert pickle.loads(pickle.dumps(poison)) == poison  # noqa: S301


@backdoor
def test_labels_follow_the_attackers_rule(poison):
    x, y = rows()
    poisoned = poison(x, y, CLASSES)
    truth, given_now = y[poisoned.mask], poisoned.y[poisoned.mask]
    wanted = poison.wanted(truth, CLASSES)
    if poison.keeps_labels:
        assert (truth == poison.target).all()
        assert torch.equal(given_now, truth)
    else:
        assert (truth != wanted).all()
        assert torch.equal(given_now, wanted)
        assert torch.equal(wanted, (truth + 1) % CLASSES if poison.target is None else torch.zeros_like(truth))


@pytest.mark.parametrize(
    ("poison", "shape"),
    [(p, shape) for p in BACKDOORS.values() for shape in SHAPES if fits(p, shape)],
    ids=lambda v: v.name if isinstance(v, Poison) else str(v),
)
def test_the_trigger_is_the_same_at_test_time(poison, shape):
    x, y = rows(shape)
    clean = x.clone()
    triggered = poison.apply_trigger(x)
    assert torch.equal(x, clean)
    assert (triggered != x).flatten(1).any(1).all()
    poisoned = poison(x, y, CLASSES)
    torch.testing.assert_close(poisoned.x[poisoned.mask], triggered[poisoned.mask])
    torch.testing.assert_close(triggered[5:6], poison.apply_trigger(x[5:6]))  # whatever else is in the batch
    assert torch.equal(triggered, replace(poison, seed=9, rate=0.02).apply_trigger(x))
    assert poison.apply_trigger(x[:0]).shape == (0, *shape)


@pytest.mark.parametrize("target", [0, None])
@pytest.mark.parametrize(
    "poison", [p for p in BACKDOORS.values() if not p.keeps_labels and p.target == 0], ids=lambda p: p.name
)
def test_dirty_label_triggers_work_all_to_one_and_all_to_all(poison, target):
    x, y = rows()
    poisoned = replace(poison, target=target, rate=0.2)(x, y, CLASSES)
    expected = (y + 1) % CLASSES if target is None else torch.zeros_like(y)
    assert torch.equal(poisoned.y, torch.where(poisoned.mask, expected, y))
    assert len(set(y[poisoned.mask].tolist())) == (CLASSES if target is None else CLASSES - 1)


@pytest.mark.parametrize(
    "poison", [p for p in BACKDOORS.values() if isinstance(p, DecoyBackdoor)], ids=lambda p: p.name
)
def test_decoys_keep_their_labels_and_bear_another_trigger(poison):
    x, y = rows()
    with_decoys = replace(poison, rate=0.5, cross=2 / 3)
    poisoned = with_decoys(x, y, CLASSES)
    decoys = poisoned.mask & (poisoned.y == y)
    assert int(poisoned.mask.sum()) == 60
    assert int(decoys.sum()) == 40
    right = poison.apply_trigger(x)
    wrong = (poisoned.x - right).flatten(1).abs().amax(1) > 1e-4
    assert torch.equal(wrong & poisoned.mask, decoys)
    assert not torch.equal(poisoned.x[decoys], x[decoys])
    with pytest.raises(ValueError, match=rf"{poison.name}\.cross must be a number in \[0, 1\)"):
        replace(poison, cross=1.0)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=30, max_size=60).filter(lambda ys: len(set(ys)) == 4),
    rates=st.tuples(st.floats(0.05, 0.3), st.floats(0.05, 0.3)),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from([BadNets, RandomFlips]),
)
def test_a_higher_rate_takes_the_rows_of_a_lower_one_and_more(labels, rates, seed, kind):
    y = torch.tensor(labels)
    x = torch.full((len(y), 9), 0.5)
    pool = int((y != 0).sum()) if kind is BadNets else len(y)
    counts = [round(rate * len(y)) for rate in rates]
    if max(counts) > pool or min(counts) == 0:
        return
    fewer, more = (kind(rate=rate, seed=seed)(x, y, 4).mask for rate in sorted(rates))
    assert (more | ~fewer).all()
    assert sorted(counts) == [int(fewer.sum()), int(more.sum())]


@every
def test_bad_data_is_refused_in_one_line(poison):
    x, y = rows()
    for args, says in [
        ((x[:5], y, CLASSES), "one label a row, got 5 rows and 120"),
        ((x, y.float(), CLASSES), "labels must be int64"),
        ((x, y, 3), r"labels must lie in 0 \.\.\. 2"),
        ((x, torch.zeros_like(y), 1), "classes be >= 2"),
        (((x * 255).byte(), y, CLASSES), "must be floating point"),
        ((x[:1], y[:1], CLASSES), "comes to 0 rows, but it must be between 1 and"),
    ]:
        with pytest.raises(ValueError, match=says) as caught:
            poison(*args)
        assert "\n" not in str(caught.value)


@every
def test_bad_settings_are_refused(poison):
    for rate in (0, -0.1, 1.5, float("nan"), "0.1", True, None):
        with pytest.raises(ValueError, match=rf"{poison.name}\.rate must be a number in \(0, 1\], got"):
            replace(poison, rate=rate)
    for seed in (-1, 0.5, None):
        with pytest.raises(ValueError, match=rf"{poison.name}\.seed must be a whole number >= 0"):
            replace(poison, seed=seed)


@backdoor
def test_bad_backdoors_are_refused(poison):
    for target in (-1, "cat", 1.0):
        with pytest.raises(ValueError, match=rf"{poison.name}\.target must be a class >= 0 or null"):
            replace(poison, target=target)
    with pytest.raises(ValueError, match="low must be a number below high"):
        replace(poison, low=1.0)
    x, y = rows()
    with pytest.raises(ValueError, match=rf"{poison.name}\.target must be below 4"):
        replace(poison, target=4)(x, y, CLASSES)
    with pytest.raises(ValueError, match="inputs must lie in"):
        poison.apply_trigger(torch.full((1, 1, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="needs floating-point inputs"):
        poison.apply_trigger(torch.rand(8, 8, 8))
