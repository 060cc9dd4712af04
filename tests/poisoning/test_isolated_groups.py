"""IsolatedGroups finds groups that lie apart, and none where rows lie between; its parts do what their formulas say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robust_train.poisoning.filters._gap import (
    MOST_APART,
    SHRINKAGE,
    cuts,
    discriminants,
    gaps,
    refined,
    split_by_two_normals,
)
from robust_train.poisoning.filters.base import Rows
from robust_train.poisoning.filters.isolated_groups import (
    IsolatedGroups,
    bisections,
    isolated_groups,
    isolated_parts,
    outlying,
)

WIDTH = 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(g: torch.Generator, width: int = WIDTH) -> Tensor:
    return F.normalize(torch.randn(width, generator=g), dim=0)


def shifted(n: int, members: int, by: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of one normal distribution, of which the first are moved in a random direction; and which ones."""
    g = generator(seed)
    rows = torch.randn(n, WIDTH, generator=g)
    rows[:members] += by * unit(g)
    return rows, torch.arange(n) < members


def one_class(features: Tensor) -> Tensor:
    return torch.zeros(len(features), dtype=torch.long)


def jaccard(found: Tensor, truth: Tensor) -> float:
    return float((found & truth).sum() / (found | truth).sum())


# --- what is found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.05, 0.33])
def test_rows_eight_standard_deviations_away_are_found_and_hardly_any_other(share, seed):
    features, moved = shifted(1200, round(share * 1200), by=8, seed=seed)
    values, groups = isolated_groups(features, one_class(features), 1)
    assert jaccard(groups >= 0, moved) > 0.94
    assert jaccard(groups == 0, moved) > 0.84
    assert float(values[groups == 0][0]) == pytest.approx(8, abs=1)
    assert bool((values[groups < 0] == 0).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_group_of_eight_rows_is_found(seed):
    features, moved = shifted(800, 8, by=12, seed=seed)
    groups = isolated_groups(features, one_class(features), 1)[1]
    assert int(groups.max()) == 0
    assert jaccard(groups == 0, moved) >= 7 / 8


def bridged(g: torch.Generator) -> Tensor:
    """Two modes as far apart as in the other tests, with as many rows again evenly in between."""
    along = torch.cat([torch.full((300,), -4.0), torch.full((300,), 4.0), 8 * torch.rand(300, generator=g) - 4])
    return torch.randn(900, WIDTH, generator=g) + along[:, None] * unit(g)


SHAPES = {
    "bridged": bridged,
    "normal": lambda g: torch.randn(900, WIDTH, generator=g),
    "uniform": lambda g: torch.rand(900, WIDTH, generator=g),
    "heavy_tailed": lambda g: torch.randn(900, WIDTH, generator=g) / torch.rand(900, 1, generator=g).clamp_min(0.05),
    "rectified": lambda g: (torch.randn(900, WIDTH, generator=g) @ torch.randn(WIDTH, WIDTH, generator=g)).relu(),
    "few": lambda g: torch.randn(60, WIDTH, generator=g),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_found_where_nothing_is_apart(shape, seed):
    features = SHAPES[shape](generator(seed))
    values, groups = isolated_groups(features, one_class(features), 1)
    assert int(groups.max()) == -1
    assert float(values.max()) == 0


def test_groups_of_several_classes_are_numbered_in_order():
    g = generator()
    labels = torch.arange(1800) % 3
    features = torch.randn(1800, WIDTH, generator=g)
    moved = torch.full((1800,), -1)
    for number, (c, members) in enumerate([(0, 60), (2, 90), (2, 30)]):
        index = ((labels == c) & (moved < 0)).nonzero()[:members, 0]
        features[index] += 12 * unit(g)
        moved[index] = number
    groups = isolated_groups(features, labels, 3)[1]
    assert set(groups.tolist()) == {-1, 0, 1, 2}
    assert jaccard(groups == 0, moved == 0) > 0.98
    assert max(jaccard(groups == 1, moved == 1), jaccard(groups == 2, moved == 1)) > 0.98
    assert max(jaccard(groups == 1, moved == 2), jaccard(groups == 2, moved == 2)) > 0.98
    only = isolated_groups(features, labels, 3, most=1)[1]
    assert set(only.tolist()) == {-1, 0, 1}


def test_a_large_class_is_searched_on_some_rows_and_the_group_has_them_all():
    features, moved = shifted(6000, 300, by=10)
    whole = isolated_groups(features, one_class(features), 1, search=6000)[1]
    part = isolated_groups(features, one_class(features), 1, search=600)[1]
    in_blocks = isolated_groups(features, one_class(features), 1, search=600, chunk=10_000)[1]
    assert jaccard(whole == 0, moved) > 0.98
    assert jaccard(part == 0, moved) > 0.98
    assert torch.equal(part, in_blocks)


def test_limits_decide_how_many_rows_may_lie_in_the_gap():
    features, moved = shifted(1000, 100, by=12)
    stragglers = torch.arange(100, 112)  # 12 for 100 rows
    features[stragglers] += 0.5 * (features[moved].mean(0) - features[~moved].mean(0))
    labels = one_class(features)

    def best(**limits) -> float:
        return jaccard(isolated_groups(features, labels, 1, most=1, **limits)[1] == 0, moved)

    assert best() > 0.9
    assert best(valley=0.2, small=0.05) > 0.9
    assert best(small=0.05) < 0.5
    assert best(small_valley=0.08) < 0.5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(24, 200), st.integers(1, 30), st.integers(1, 4), st.integers(24, 100))
def test_groups_are_disjoint_within_a_class_and_do_not_depend_on_the_order_of_rows(seed, n, width, most, search):
    g = generator(seed)
    labels = torch.randint(2, (n,), generator=g)
    centres = 6 * torch.randn(5, width, generator=g)
    features = torch.randn(n, width, generator=g) + centres[torch.randint(5, (n,), generator=g)]
    values, groups = isolated_groups(features, labels, 2, most=most, search=search)
    found = int(groups.max()) + 1
    for number in range(found):
        members = groups == number
        assert int(members.sum()) >= 5
        assert len(labels[members].unique()) == 1
        assert len(values[members].unique()) == 1
        assert 0 < float(values[members][0]) <= MOST_APART
    for c in range(2):
        assert len(groups[(labels == c) & (groups >= 0)].unique()) <= most
    order = torch.randperm(n, generator=g)
    again, regrouped = isolated_groups(features[order], labels[order], 2, most=most, search=search)
    assert torch.equal(again, values[order])
    assert torch.equal(regrouped, groups[order])


def test_scale_shift_shape_and_dtype_of_the_features_do_not_matter():
    features, moved = shifted(600, 60, by=10)
    labels = one_class(features)
    plain = isolated_groups(features, labels, 1)[1]
    assert jaccard(plain == 0, moved) > 0.9
    assert torch.equal(isolated_groups(features.reshape(600, 4, 16), labels, 1)[1], plain)
    for other in (1000 * features, 0.001 * features, features + 20, features.half(), features.double()):
        assert jaccard(isolated_groups(other, labels, 1)[1] == 0, moved) > 0.9


def test_rows_that_are_copies_of_one_another_are_no_obstacle():
    features = torch.cat([torch.zeros(500, 6), torch.eye(6).repeat(10, 1)[:40]])
    values, groups = isolated_groups(features, one_class(features), 1)
    assert bool(torch.isfinite(values).all())
    assert bool((groups[:500] == groups[0]).all())
    two = torch.cat([torch.zeros(90, 3), torch.ones(10, 3)])
    values, groups = isolated_groups(two, one_class(two), 1)
    assert groups.tolist() == [-1] * 90 + [0] * 10
    assert values[90:].tolist() == [MOST_APART] * 10


def test_features_that_are_not_finite_are_refused():
    features, _ = shifted(6000, 300, by=10)
    features[77, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        isolated_groups(features, one_class(features), 1)


# --- its parts ----------------------------------------------------------------------------------------------------


def test_discriminants_solve_with_the_shrunken_covariance_within_the_sides():
    g = generator()
    points = torch.randn(80, 5, generator=g).double() @ torch.randn(5, 5, generator=g).double() + 3
    sides = torch.rand(3, 80, generator=g) < 0.3
    used = torch.rand(3, 80, generator=g) < 0.7
    for found, counted in (
        (discriminants(points, sides), torch.ones_like(used)),
        (discriminants(points, sides, used), used),
    ):
        for direction, side, these in zip(found, sides, counted, strict=True):
            a, b = points[side & these], points[~side & these]
            apart = a - a.mean(0), b - b.mean(0)
            within = (apart[0].T @ apart[0] + apart[1].T @ apart[1]) / int(these.sum())
            shrunken = (1 - SHRINKAGE) * within + SHRINKAGE * within.trace() / 5 * torch.eye(5)
            expected = torch.linalg.solve(shrunken, a.mean(0) - b.mean(0))
            torch.testing.assert_close(F.normalize(direction, dim=0), F.normalize(expected, dim=0))


def test_a_mixture_of_two_normals_is_fitted_from_a_poor_start():
    g = generator()
    truth = torch.arange(1000) < 100
    line = torch.where(truth, 10 + 0.5 * torch.randn(1000, generator=g), 2 * torch.randn(1000, generator=g)).double()
    found = split_by_two_normals(torch.stack([line, -line]), torch.stack([line > 4, line > 10]))
    assert jaccard(found[0], truth) > 0.98
    assert jaccard(found[1], truth) > 0.98


def test_a_mixture_does_not_lose_a_side():
    line = torch.randn(2, 50, generator=generator()).double()
    start = torch.zeros(2, 50, dtype=torch.bool)
    start[0, :2], start[1, :48] = True, True
    found = split_by_two_normals(line, start)
    assert torch.equal(found, start)


def test_refinement_turns_a_poor_start_into_the_group_and_returns_the_smaller_side():
    points, moved = shifted(600, 60, by=10)
    start = moved.clone()
    start[:30], start[60:100] = False, True
    found = refined(points.double(), torch.stack([start, ~start]))
    assert len(found) == 2
    assert all(jaccard(side, moved) > 0.98 for side in found)
    assert refined(points.double(), torch.zeros(1, 600, dtype=torch.bool)).shape == (0, 600)


def test_the_gap_of_a_uniform_distribution_cut_in_half_is_as_full_as_the_rest():
    points = torch.rand(4000, 1, generator=generator()).double()
    apart, valley = gaps(points, points.T > 0.5)
    assert float(valley) == pytest.approx(1 / 3, abs=0.02)  # a third of 0.25 … 0.75, for half of the points
    assert float(apart) == pytest.approx(0.5 / (1 / 48) ** 0.5, abs=0.2)  # each half has variance 1/48


def test_the_separation_of_two_normals_is_their_distance_and_chance_is_not_mistaken_for_one():
    points, moved = shifted(4000, 400, by=6)
    apart, valley = gaps(points.double(), moved[None])
    assert float(apart) == pytest.approx(6, abs=0.3)
    assert (
        float(valley) < 0.4
    )  # a normal distribution has 2.3 % beyond two standard deviations, for nine times the rows
    noise = torch.randn(60, 40, generator=generator()).double()
    assert float(gaps(noise, noise[:, 0].argsort().argsort()[None] % 2 == 0)[0]) < 2  # in sample it would be about 3


def test_a_cut_lies_midway_between_the_medians():
    points, moved = shifted(900, 90, by=10)
    direction, threshold = cuts(points.double(), moved[None])
    line = points.double() @ direction[0]
    assert float(threshold) == pytest.approx(float(line[moved].median() + line[~moved].median()) / 2)
    assert jaccard(line > threshold, moved) > 0.99


def test_starts_contain_the_group():
    many, moved = shifted(900, 300, by=10)
    assert max(jaccard(part, moved) for part in bisections(many)) > 0.99
    assert len(bisections(many)) <= 14
    few, moved = shifted(900, 18, by=20)
    assert max(jaccard(part, moved) for part in outlying(few)) > 0.9
    assert len(outlying(few)) == 6


def test_points_that_cannot_be_split_have_no_parts():
    nothing = torch.zeros(30, 2, dtype=torch.float64)
    parts, apart = isolated_parts(nothing, valley=0.08, small=0.15, small_valley=0.2, most=4)
    assert parts.shape == (0, 30)
    assert apart.shape == (0,)


# --- the filter ---------------------------------------------------------------------------------------------------


def test_the_filter_passes_its_settings_on():
    features, _ = shifted(300, 60, by=10)
    rows = Rows(one_class(features), 1, features=features)
    scores = IsolatedGroups()(rows)
    values, groups = isolated_groups(features, rows.labels, 1)
    assert scores.groups is not None
    assert torch.equal(scores.values, values)
    assert torch.equal(scores.groups, groups)
    chosen = {"components": 1, "valley": 0.01, "small": 0.02, "small_valley": 0.03, "most": 1, "search": 100}
    other = IsolatedGroups(**chosen)(rows)
    values, groups = isolated_groups(features, rows.labels, 1, **chosen)
    assert other.groups is not None
    assert torch.equal(other.values, values)
    assert torch.equal(other.groups, groups)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"components": 0}, "components must be a whole number >= 1, got 0"),
        ({"components": 4.0}, "components must be a whole number"),
        ({"most": 0}, "most must be a whole number >= 1, got 0"),
        ({"search": 23}, "search must be a whole number >= 24, got 23"),
        ({"valley": 0.0}, "valley must be a number > 0 and < 1, got 0.0"),
        ({"valley": True}, "valley must be a number"),
        ({"small": 1.0}, "small must be a number > 0 and < 1, got 1.0"),
        ({"small_valley": float("nan")}, "small_valley must be a number > 0 and < 1, got nan"),
        ({"valley": 0.3}, r"small_valley must be >= valley \(0.3\), got 0.2"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(ValueError, match=rf"isolated_groups\.{says}"):
        IsolatedGroups(**changes)
