from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from robust_train.poisoning.checks import ALPHA, SeenRows, Violation, check, check_shares, digests, extremes
from robust_train.poisoning.infer import HEADROOM, infer, observe
from robust_train.poisoning.schema import RULES, Schema

IMAGES = Schema(
    dtype="float32",
    shape=(1, 8, 8),
    low=0.0,
    high=1.0,
    constant_rows=False,
    label_dtype="int64",
    label_shape=(),
    classes=3,
    conflicting_labels=False,
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def images(n: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3


def rules(found: list[Violation]) -> dict[str, tuple[int, ...]]:
    return {violation.rule: violation.rows for violation in found}


# --- the rules --------------------------------------------------------------------------------------------------------


def test_rows_without_fault_break_no_rule():
    assert check(IMAGES, *images()) == []
    assert check(IMAGES, *images(0)) == []


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("finite", lambda x, y: x[4, 0, 3, 3].fill_(math.nan)),
        ("finite", lambda x, y: x[4, 0, 0, 0].fill_(-math.inf)),
        ("range", lambda x, y: x[4, 0, 7, 7].fill_(1.01)),
        ("range", lambda x, y: x[4, 0, 7, 7].fill_(-1e-6)),
        ("constant", lambda x, y: x[4].fill_(0.25)),
        ("labels", lambda x, y: y[4].fill_(3)),
        ("labels", lambda x, y: y[4].fill_(-1)),
    ],
)
def test_a_row_at_fault_is_named_and_no_other(rule, spoil):
    x, y = images()
    spoil(x, y)
    found = check(IMAGES, x, y)
    assert rules(found)[rule] == (4,)
    assert all(violation.rows == (4,) for violation in found)
    assert check(IMAGES, x, y, skip=RULES) == []
    assert rule not in rules(check(IMAGES, x, y, skip=[rule]))


def test_messages_name_the_values():
    x, y = images()
    x[2, 0, 0, 0], y[5] = 1.75, 9
    texts = [str(violation) for violation in check(IMAGES, x, y)]
    assert any("range" in t and "to 1.75, outside of [0.0, 1.0] (rows 2)" in t for t in texts)
    assert any("labels [9] are none of [0, 1, 2] (rows 5)" in t for t in texts)
    x[:] = 2.0
    assert any("… (12 rows)" in str(violation) for violation in check(IMAGES, x, y))


def test_a_wrong_dtype_or_shape_is_a_fault_of_every_row():
    x, y = images(4)
    assert rules(check(IMAGES, x.double(), y)) == {"dtype": (0, 1, 2, 3)}
    assert rules(check(IMAGES, x, y.int())) == {"label_dtype": (0, 1, 2, 3)}
    assert rules(check(IMAGES, x[..., :7], y)) == {"shape": (0, 1, 2, 3)}
    assert rules(check(IMAGES, x[:, 0], y)) == {"shape": (0, 1, 2, 3)}
    assert rules(check(IMAGES, x, y[:, None])) == {"label_shape": (0, 1, 2, 3)}
    assert check(replace(IMAGES, shape=(1, None, None)), x[..., :5], y) == []


def test_ranges_by_channel():
    schema = Schema(shape=(3, 2, 2), low=(0.0, -1.0, -1.0), high=(1.0, 1.0, 0.0))
    x = torch.zeros(3, 3, 2, 2)
    assert check(schema, x) == []
    x[0, 0, 0, 0], x[1, 1, 0, 0], x[2, 2, 0, 0] = -0.5, -0.5, 0.5
    assert rules(check(schema, x)) == {"range": (0, 2)}
    one_bound = Schema(shape=(3,), high=(1.0, 2.0, 3.0))
    assert rules(check(one_bound, torch.tensor([[1.0, 2, 3], [1, 3, 2]]))) == {"range": (1,)}


def test_rows_may_hold_nan_or_be_constant_where_the_schema_says_so():
    x = torch.stack([torch.full((4,), math.nan), torch.zeros(4), torch.arange(4.0)])
    assert check(Schema(finite=False, low=0.0, high=3.0), x) == []
    assert rules(check(Schema(finite=False, constant_rows=False), x)) == {"constant": (1,)}


@pytest.mark.parametrize(
    ("classes", "labels", "bad"),
    [
        ((0, 1), [0.0, 1.0, 0.5, math.nan], (2, 3)),
        ((0, 5, 255), [0, 5, 255, 7], (3,)),
        (None, [0.25, math.inf, -3.0], (1,)),
        ((0, 1), [True, False], ()),
        ((-100, 0, 1), [[0, 1], [-100, 1], [2, 0]], (2,)),
    ],
)
def test_labels_of_every_kind(classes, labels, bad):
    y = torch.tensor(labels)
    assert rules(check(Schema(classes=classes), torch.rand(len(y), 4), y)).get("labels", ()) == bad


def test_unsigned_labels_are_compared_with_negative_classes():
    assert check(Schema(classes=(-1, 0, 1)), torch.rand(2, 4), torch.tensor([0, 1], dtype=torch.uint8)) == []


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_every_dtype_can_be_checked(dtype):
    x = (torch.arange(12).reshape(3, 4) % 5).to(dtype)
    schema = Schema(dtype=str(dtype).removeprefix("torch."), low=0, high=4, constant_rows=False)
    assert check(schema, x) == []
    assert len({*digests(x)}) == (3 if dtype != torch.bool else len({tuple(row) for row in x.tolist()}))


@given(
    st.sampled_from(DTYPES),
    st.floats(-3, 3, width=32),
    st.floats(0, 3, width=32),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_rounding_to_another_precision_leads_out_of_no_range(dtype, low, width, shares):
    high = low + width
    x = torch.tensor([[min(max(low + s * width, low), high) for s in shares]], dtype=torch.float64)
    assert check(Schema(low=low, high=high), x) == []
    assert check(Schema(low=low, high=high), x.float().to(dtype)) == []


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_row_is_judged_alone(seed, n):
    """Whether it is at fault depends neither on the rows around it nor on their order."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 3, generator=g) * 1.2
    x[torch.rand(n, generator=g) < 0.2] = 0.5
    x[torch.rand(x.shape, generator=g) < 0.05] = math.nan
    y = torch.randint(0, 5, (n,), generator=g)
    schema = Schema(low=0.0, high=1.1, constant_rows=False, classes=4)
    whole = check(schema, x, y)
    alone = {
        rule: tuple(i for i in range(n) if rule in rules(check(schema, x[i : i + 1], y[i : i + 1]))) for rule in RULES
    }
    assert rules(whole) == {rule: rows for rule, rows in alone.items() if rows}
    good = [i for i in range(n) if not any(i in rows for rows in rules(whole).values())]
    order = torch.tensor(good)[torch.randperm(len(good), generator=g)].long()
    assert check(schema, x[order], y[order]) == []


def test_inputs_and_labels_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="3 rows and the labels 2"):
        check(Schema(), torch.rand(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="first dimension"):
        check(Schema(), torch.tensor(1.0))


def test_rows_without_numbers_have_only_a_shape():
    assert check(Schema(low=0.0, constant_rows=False), torch.zeros(3, 0)) == []
    assert rules(check(Schema(shape=(4,)), torch.zeros(3, 0))) == {"shape": (0, 1, 2)}
    assert [t.shape for t in extremes(torch.zeros(3, 0), False)] == [(3, 0), (3, 0)]
    assert len(set(digests(torch.zeros(3, 0)))) == 1


# --- rules that look at rows together ---------------------------------------------------------------------------------


def test_equal_rows_with_different_labels_conflict():
    x, y = images(6)
    seen = SeenRows(100)
    assert seen.conflicts(x, y) is None
    assert seen.conflicts(x, y) is None
    y[2] = 0
    found = seen.conflicts(x.flip(0), y.flip(0))
    assert found is not None
    assert found.rows == (3,)
    assert "labels here [0]" in found.message
    twins = SeenRows(100).conflicts(x[[0, 1, 0, 0]], torch.tensor([1, 1, 1, 2]))
    assert twins is not None
    assert twins.rows == (3,)


def test_no_more_rows_are_remembered_than_allowed():
    x, y = images(12)
    seen = SeenRows(5)
    assert seen.conflicts(x, y) is None
    assert len(seen) == 5
    assert seen.conflicts(x[-5:], y[-5:] + 1) is not None
    assert SeenRows(5).conflicts(torch.cat([x, x[:1]]), torch.cat([y, y[:1] + 1])) is None  # forgotten by then


def test_digests_tell_content_dtype_and_shape():
    x = torch.arange(8, dtype=torch.float32)
    same = {digests(x[None])[0], digests(x.clone()[None])[0], digests(torch.stack([x * 2, x]))[1]}
    other = {digests(x[None].double())[0], digests(x.reshape(1, 2, 4))[0], digests(x.flip(0)[None])[0]}
    assert len(same) == 1
    assert len(same | other) == 4


def test_class_shares_beyond_tolerance_and_chance_are_found():
    schema = Schema(classes=3, shares=(0.5, 0.25, 0.25), share_tolerance=0.05)
    assert check_shares(schema, {0: 500, 1: 250, 2: 250}) is None
    assert check_shares(schema, {0: 540, 1: 230, 2: 230}) is None  # within the tolerance
    assert check_shares(schema, {0: 3}) is None  # too few to tell
    assert check_shares(schema, {}) is None
    assert check_shares(replace(schema, shares=None), {0: 1000}) is None
    found = check_shares(schema, {0: 350, 1: 400, 2: 250})
    assert found is not None
    assert found.rule == "balance"
    assert found.rows == ()
    assert "class 1 has a share of 0.400, expected 0.250" in found.message
    assert "class 2" not in found.message


def test_a_class_that_is_missing_is_found():
    schema = Schema(classes=10, shares=[0.1] * 10, share_tolerance=0.02)
    found = check_shares(schema, dict.fromkeys(range(9), 100))
    assert found is not None
    assert "class 9 has a share of 0.000" in found.message


def test_false_alarms_of_the_class_shares_are_rare():
    """At the very edge of the tolerance: among 20,000 epochs at a level of 1e-4 two are expected; 10 would be odd."""
    schema = Schema(classes=2, shares=(0.5, 0.5), share_tolerance=0.05)
    drawn = np.random.default_rng(0).binomial(400, 0.55, 20_000)
    values, times = np.unique(drawn, return_counts=True)
    alarms = sum(
        int(t) for k, t in zip(values, times, strict=True) if check_shares(schema, {0: int(k), 1: 400 - int(k)})
    )
    assert alarms < 10
    assert ALPHA == 1e-4


# --- inference --------------------------------------------------------------------------------------------------------


def from_batches(x: torch.Tensor, y: torch.Tensor | None = None, size: int = 8) -> Schema:
    ys = [None] * math.ceil(len(x) / size) if y is None else list(y.split(size))
    return infer([observe(a, b) for a, b in zip(x.split(size), ys, strict=True)])


def test_the_schema_of_images():
    x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    found = from_batches(x, y)
    assert found == replace(IMAGES, shares=(1 / 3,) * 3, share_tolerance=found.share_tolerance)


def test_the_tolerance_of_shares_covers_what_few_rows_leave_open():
    """A true share that is off by the tolerance would make so extreme a count about as rare as ALPHA / (2 classes)."""
    found = from_batches(torch.rand(500, 4), torch.arange(500) % 5)
    level, tolerance = ALPHA / 10, found.share_tolerance
    assert 0 < binom.cdf(100, 500, 0.2 + tolerance) <= level < 2 * binom.cdf(100, 500, 0.2 + tolerance - 0.002)
    assert from_batches(torch.rand(2000, 4), torch.arange(2000) % 5).share_tolerance < 0.6 * tolerance
    assert from_batches(torch.rand(40, 4), torch.zeros(40, dtype=torch.long)).shares == (1.0,)


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (torch.linspace(0.005, 1, 64).reshape(8, 8), 0.0, 1.0),
        (torch.linspace(-1, 0.99, 64).reshape(8, 8), -1.0, 1.0),
        (torch.linspace(0, 255, 64).reshape(8, 8), 0.0, 255.0),
        (torch.arange(256, dtype=torch.uint8).reshape(4, 64), 0.0, 255.0),
        (torch.linspace(0, 0.5, 64).reshape(8, 8), 0.0, 0.5 * (1 + HEADROOM)),
        (torch.linspace(10, 12, 64).reshape(8, 8), 9.0, 13.0),
        (torch.linspace(-4, 2, 64).reshape(8, 8), -7.0, 5.0),
        (torch.linspace(0.5, 3, 64).reshape(8, 8), 0.0, 4.25),
        (torch.arange(64).reshape(8, 8) + 3, 0.0, 98.0),
    ],
)
def test_known_ranges_are_exact_and_others_get_headroom(x, low, high):
    found = infer([observe(x[:, None])])  # one range for all
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)


def test_features_of_a_table_have_ranges_of_their_own():
    x = torch.stack([torch.linspace(0, 1, 20), torch.linspace(-100, 100, 20), torch.zeros(20)], 1)
    found = from_batches(x)
    assert found.low == pytest.approx((0.0, -200.0, -200.0))
    assert found.high == pytest.approx((1.0, 200.0, 200.0))  # the third never moved: the table's own range
    assert rules(check(found, torch.tensor([[2.0, 0, 0], [0, 150, 0]]))) == {"range": (0,)}


def test_channels_of_normalised_images():
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    found = from_batches((torch.rand(32, 3, 8, 8) - mean) / std)
    assert isinstance(found.low, tuple)
    assert len(set(found.low)) == 3


def test_sizes_that_differ_are_free():
    found = infer([observe(torch.rand(4, 7, 16)), observe(torch.rand(4, 9, 16))])
    assert found.shape == (None, 16)
    with pytest.raises(ValueError, match="different shapes"):
        infer([observe(torch.rand(4, 7)), observe(torch.rand(4, 7, 1))])
    with pytest.raises(ValueError, match="different dtypes: float32, float64"):
        infer([observe(torch.rand(4, 7)), observe(torch.rand(4, 7).double())])


def test_a_label_set_is_closed_only_once_every_class_was_seen_often():
    x = torch.rand(64, 4)
    assert from_batches(x, torch.arange(64) % 8).classes == tuple(range(8))
    rare = torch.arange(64) % 8
    rare[rare == 7] = 6
    rare[0] = 7
    found = from_batches(x, rare)
    assert (found.classes, found.shares) == (None, None)
    assert found.conflicting_labels


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (torch.randn(40), None),
        (torch.arange(40) % 2 == 0, (0, 1)),
        ((torch.arange(40) % 2).float(), (0, 1)),
        (torch.arange(40)[:, None].expand(40, 6) % 2, (0, 1)),
        (torch.where(torch.arange(40) % 4 > 0, torch.arange(40) % 4, -100), (-100, 1, 2, 3)),
        (torch.arange(40) * 1000, None),
    ],
)
def test_what_labels_can_be(y, classes):
    found = from_batches(torch.rand(40, 4), y)
    assert found.classes == classes
    assert (found.shares is None) == (classes is None or y.ndim > 1)


def test_what_was_seen_is_allowed():
    x, y = images(30)
    x[3] = 0.0
    assert from_batches(x, y).constant_rows
    assert not from_batches(x[4:], y[4:]).constant_rows
    twins, labels = torch.cat([x, x[5:6]]), torch.cat([y, y[5:6] + 1])
    assert from_batches(twins, labels % 3).conflicting_labels
    assert not from_batches(x, y).conflicting_labels
    assert from_batches(torch.rand(30, 4), y).constant_rows  # so few numbers may be equal by chance
    assert from_batches(torch.rand(30, 4), y).conflicting_labels


@pytest.mark.parametrize("x", [torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, -math.inf]])])
def test_nothing_is_inferred_from_broken_numbers(x):
    with pytest.raises(ValueError, match="trusted inputs hold NaN"):
        observe(x)
    with pytest.raises(ValueError, match="trusted labels hold NaN"):
        observe(torch.rand(1, 2), x)
    with pytest.raises(ValueError, match="from no data"):
        infer([])


@given(
    st.sampled_from([*DTYPES, torch.uint8, torch.int64]),
    st.sampled_from([(), (3,), (70,), (2, 5), (3, 4, 6)]),
    st.integers(0, 10**6),
    st.sampled_from(["none", "classes", "numbers", "masks"]),
)
@settings(max_examples=60, deadline=None)
def test_trusted_batches_fit_the_schema_inferred_from_them(dtype, shape, seed, kind):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(30, *shape, generator=g) * 10 ** torch.randint(0, 4, (1,), generator=g).item()).abs().to(dtype)
    x[7] = x[3]
    y = {
        "none": None,
        "classes": torch.randint(0, 3, (30,), generator=g),
        "numbers": torch.randn(30, 2, generator=g),
        "masks": torch.randint(0, 3, (30, 4, 4), generator=g),
    }[kind]
    ys = [None] * 4 if y is None else list(y.split(8))
    observations = [observe(a, b) for a, b in zip(x.split(8), ys, strict=True)]
    found = infer(observations)
    assert infer(observations[::-1]) == found
    seen, counts = SeenRows(100), {}
    for a, b in zip(x.split(8), ys, strict=True):
        assert check(found, a, b) == []
        assert found.conflicting_labels or b is None or seen.conflicts(a, b) is None
    if found.classes and y is not None:
        counts = {c: int((y == c).sum()) for c in found.classes}
    assert check_shares(found, counts) is None
    assert Schema.from_dict(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [Schema(), IMAGES, Schema(shape=(None, 2), low=0, high=1e30, source="by hand: äß")])
def test_a_schema_survives_its_file(schema, tmp_path):
    schema.write(tmp_path / "data_schema.yaml")
    assert Schema.read(tmp_path / "data_schema.yaml") == schema
    assert [p.name for p in tmp_path.iterdir()] == ["data_schema.yaml"]


def test_a_few_fields_by_hand_are_enough(tmp_path):
    (tmp_path / "mine.yaml").write_text("low: [0, 0]\nhigh: 1\nshape: [2]\nclasses: 4\n")
    assert Schema.read(tmp_path / "mine.yaml") == Schema(low=(0, 0), high=1, shape=(2,), classes=(0, 1, 2, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clases: 3", "no field 'clases' .did you mean 'classes'"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [", "mine.yaml: while parsing"),
        ("version: 2", "version must be 1, got 2"),
        ("schema: other", "schema must be 'robust_train/data_schema'"),
        ("dtype: float31", "schema.dtype must be a dtype of torch such as 'float32', got 'float31'"),
        ("label_dtype: Tensor", "schema.label_dtype must be a dtype"),
        ("shape: [1, -2]", "schema.shape must be a list of sizes"),
        ("shape: 3", "schema.shape must be a list of sizes"),
        ("low: red", "schema.low must be a number or a list"),
        ("low: .nan", "schema.low must be a number or a list"),
        ("{low: 2, high: 1}", "schema.low must not exceed schema.high, got 2 and 1"),
        ("{low: [0, 2], high: 1, shape: [2]}", "schema.low must not exceed"),
        ("{low: [0, 2], shape: [3]}", "schema.low has 2 values, one for each index"),
        ("{low: [0, 2]}", "schema.low has 2 values, one for each index"),
        ("finite: 3", "schema.finite must be true or false"),
        ("classes: [0, 0]", "schema.classes must be a number of classes"),
        ("classes: 0", "schema.classes must be a number of classes"),
        ("classes: [a]", "schema.classes must be a number of classes"),
        ("shares: [0.5, 0.5]", "one for each of schema.classes"),
        ("{classes: 2, shares: [0.5, 0.6]}", "sum to 1"),
        ("{classes: 3, shares: [0.5, 0.5]}", "one for each of schema.classes"),
        ("share_tolerance: 2", "schema.share_tolerance must be in"),
        ("source: 3", "schema.source must be text"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_a_bad_file_is_refused_with_one_clear_error(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Schema.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.yaml: No such file"):
        Schema.read(tmp_path / "none.yaml")


def test_it_says_what_it_is_in_a_line():
    assert IMAGES.describe() == "float32 (1, 8, 8) in [0, 1]; 3 classes"
    assert Schema().describe() == "any dtype; any labels"
    assert Schema(shape=(2, None), low=(0, 1)).describe() == "any dtype (2, any) in [by channel, any]; any labels"
