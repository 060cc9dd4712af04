"""Which rows changed, appeared, vanished or moved."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_train.custody.difference import Difference, aligned, difference

ROWS = [f"{i:04}" for i in range(100)]


def found(*edits) -> Difference:
    """``(i, "x")`` replaces, ``(i, None)`` deletes, ``(i, ["x"])`` inserts before; i as in the original."""
    rows: list = [[row] for row in ROWS] + [[]]
    for i, edit in edits:
        rows[i] = [edit] if isinstance(edit, str) else [] if edit is None else edit + rows[i]
    return difference(ROWS, sum(rows, []))


def test_equal():
    assert found().equal
    assert found() == Difference()
    assert found().text() == "no difference"


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([(7, "x")], Difference(changed=(7,))),
        ([(0, "x"), (99, "y")], Difference(changed=(0, 99))),
        ([(7, "x"), (8, "y"), (9, "z")], Difference(changed=(7, 8, 9))),
        ([(7, None)], Difference(vanished=(7,))),
        ([(0, None), (50, None), (99, None)], Difference(vanished=(0, 50, 99))),
        ([(0, ["x"])], Difference(appeared=(0,))),
        ([(100, ["x", "y"])], Difference(appeared=(100, 101))),
        ([(3, ["x"]), (60, "y"), (90, None)], Difference(changed=(60,), appeared=(3,), vanished=(90,))),
        ([(3, ["x"]), (5, "y"), (6, "z")], Difference(changed=(5, 6), appeared=(3,))),
        ([(7, None), (50, ["0007"])], Difference(moved=((7, 49),))),
        ([(7, "0008"), (8, "0007")], Difference(moved=((7, 8),))),
        ([(7, "0093"), (93, "0007")], Difference(moved=((7, 93), (93, 7)))),
    ],
)
def test_what_was_done_is_what_is_named(edits, expected):
    assert found(*edits).to_dict() == expected.to_dict() or found(*edits) == mirrored(expected)


def mirrored(expected: Difference) -> Difference:
    """Of two neighbours that changed places either may be called the moved one."""
    return Difference(moved=tuple((b, a) for a, b in expected.moved))


def test_a_first_duplicate_that_vanishes_is_the_one_named():
    rows = ["a", *ROWS, "a"]
    assert difference(rows, rows[1:]) == Difference(vanished=(0,))
    assert difference(["a", "a", "b"], ["a", "b"]) == Difference(vanished=(1,))
    assert difference(["b", *ROWS, "a", "b"], ["x", *ROWS, "a", "y"]) == Difference(changed=(0, 102))


def test_the_number_decides_where_the_neighbours_do_not():
    assert difference(["a", "x", "b"], ["b", "y", "a"]).changed == (1,)


def test_a_reversed_list_has_moved():
    result = difference(ROWS, ROWS[::-1])
    assert len(result.moved) == 99
    assert result == Difference(moved=result.moved)


def test_empty_lists():
    assert difference([], []) == Difference()
    assert difference([], ["a"]) == Difference(appeared=(0,))
    assert difference(["a"], []) == Difference(vanished=(0,))


def test_files_are_the_same_by_name():
    names = ["a", "b", "c"]
    assert difference(["1", "2", "3"], ["1", "9", "3"], names, names) == Difference(changed=(1,))
    assert difference(["1", "2", "3"], ["1", "8", "9"], names, ["a", "b2", "c"]) == Difference((2,), (1,), (1,))
    assert difference(["1", "2"], ["8", "1", "9"], ["a", "b"], ["0", "a", "b"]) == Difference((1,), (0,))


lists = st.lists(st.sampled_from("abcdefgh"), max_size=12)


@given(lists, lists)
def test_every_row_is_accounted_for(before, after):
    result = difference(before, after)
    assert result.equal == (before == after)
    lost, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    assert len(result.vanished) + len(result.changed) == sum(lost.values())
    assert len(result.appeared) + len(result.changed) == sum(new.values())
    assert all(before[i] == after[j] for i, j in result.moved)
    assert len(set(result.changed) | set(result.vanished) | {i for i, _ in result.moved}) == (
        len(result.changed) + len(result.vanished) + len(result.moved)
    )


@given(lists, lists)
def test_the_alignment_ascends_on_both_sides(before, after):
    pairs = aligned(before, after)
    assert all(before[i] == after[j] for i, j in pairs)
    assert all(i < k and j < m for (i, j), (k, m) in zip(pairs, pairs[1:], strict=False))


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from("xyz") | st.none()), max_size=6))
def test_unique_rows_that_stay_in_order_never_move(edits):
    assert not found(*dict(edits).items()).moved


def test_text_names_rows_up_to_the_limit():
    result = found((3, "x"), (10, "x"), *((i, "x") for i in range(20, 30)), (60, None), (80, ["y"]))
    assert result.text() == "changed   12 (3, 10, 20-29)\nappeared  1 (79)\nvanished  1 (60)"
    assert result.text(limit=1).splitlines()[0] == "changed   12 (3, and 2 more)"
    assert "moved     2 (7 -> 93, 93 -> 7)" in found((7, "0093"), (93, "0007")).text()


def test_text_shows_names_and_no_control_characters():
    result = difference(["1", "2", "3"], ["1", "9"], ["a", "b c", "\x1b[2J"], ["a", "b c"])
    assert result.text() == "changed   1 (1 b c)\nvanished  1 (2 '\\x1b[2J')"


def test_as_plain_builtins():
    result = difference(["1", "2", "3"], ["1", "9"], ["a", "b", "c"], ["a", "b"])
    assert result.to_dict() == {
        "equal": False,
        "changed": [{"row": 1, "name": "b"}],
        "appeared": [],
        "vanished": [{"row": 2, "name": "c"}],
        "moved": [],
    }


def test_large_and_odd_lists_take_no_time():
    numbers = [str(i) for i in range(20_000)]
    shuffled = random.Random(0).sample(numbers, len(numbers))
    begin = time.perf_counter()
    for before, after in (
        (numbers, shuffled),
        (["a"] * 20_000, ["a", "b"] * 10_000),
        (numbers, [n + "x" for n in numbers]),
        (["a", "b"] * 10_000, ["b", "a"] * 10_000),
    ):
        difference(before, after)
    assert time.perf_counter() - begin < 10
