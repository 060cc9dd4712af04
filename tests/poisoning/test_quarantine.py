"""The quarantine: what it holds, what can be put back, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_train.poisoning.quarantine import Entry, Event, Quarantine
from robust_train.poisoning.records import DROP, KEEP, QUARANTINE, Column, Decisions

ROOT = "ab" * 32


def digest(row: int) -> str:
    return f"{row:064x}"


def decided(digests=True, kept=(), n=6):
    """Rows 1, 3 and 5 are taken out, by one or two filters; those in ``kept`` are used nonetheless."""
    decision = np.array([QUARANTINE if i in (1, 3) else DROP if i == 5 else KEEP for i in range(n)])
    decision[list(kept)] = KEEP
    scores = np.arange(float(n))
    columns = (
        Column("spectral", scores, 2.5, scores > 2.5),
        Column("aum", -scores, None, np.arange(n) == 1),
    )
    digests = [digest(i) for i in range(n)] if digests else None
    return Decisions(np.arange(n) % 3, digests, columns, decision, (decision == KEEP).astype(float))


def quarantine(digests=True, root=ROOT):
    return Quarantine.of(decided(digests), classes=3, root=root)


def test_it_lists_the_rows_that_are_left_out():
    made = quarantine()
    assert [entry.index for entry in made.entries] == [1, 3, 5]
    assert made.entries[1] == Entry(3, digest(3), 0, ("spectral",), {"spectral": 3.0, "aum": -3.0}, "quarantine")
    assert made.entries[0].filters == ("aum",)
    assert made.entries[2].decision == "drop"
    assert made.filters == ["spectral", "aum"]
    assert made.counts() == {"quarantined": 3, "restored": 0}


def test_the_mask_keeps_what_is_not_quarantined():
    made = quarantine()
    assert (made.mask(6) == decided().kept).all()
    assert made.restore([3]).mask(6).tolist() == [True, False, True, True, True, False]
    with pytest.raises(ValueError, match="of 6 rows, not of 7"):
        made.mask(7)


def test_restoring_is_recorded_once_and_changes_nothing_else():
    made = quarantine()
    back = made.restore([5, 5], reason="looked at it", who="ada", when="2024-12-31T00:00:00+00:00")
    assert made.counts()["restored"] == 0
    assert back.counts() == {"quarantined": 2, "restored": 1}
    assert back.entries[2].history == (Event("2024-12-31T00:00:00+00:00", "ada", "restored", "looked at it"),)
    assert back.restore([5], reason="again") == back
    assert back.entries[:2] == made.entries[:2]
    with pytest.raises(ValueError, match="no entry has the index 0, 99: only rows of the quarantine"):
        made.restore([99, 0, 1])


def test_restored_rows_are_told_by_their_content():
    back = quarantine().restore([3])
    moved = [digest(i) for i in (9, 3, 0, 3, 8, 7, 1)]
    assert back.restored(7, digests=moved).tolist() == [False, True, False, True, False, False, False]
    with pytest.raises(ValueError, match="7 digests for 6 rows"):
        back.restored(6, digests=moved)


def test_without_digests_only_the_same_data_will_do():
    for digests in (True, False):
        back = quarantine(digests).restore([3])
        assert np.flatnonzero(back.restored(6, root=ROOT)).tolist() == [3]
        for rows, root in ((6, "cd" * 32), (6, None), (7, ROOT)):
            with pytest.raises(ValueError, match="cannot be found again without digests"):
                back.restored(rows, root=root)
    nameless = quarantine(digests=False, root=None).restore([3])
    with pytest.raises(ValueError, match="cannot be found again"):
        nameless.restored(6, digests=[digest(i) for i in range(6)])


def test_where_nothing_was_restored_any_data_will_do():
    assert not quarantine(digests=False).restored(9).any()


@pytest.mark.parametrize("digests", [True, False])
def test_the_next_run_keeps_restored_rows_on_record(digests):
    before = quarantine(digests).restore([3], reason="fine", who="ada")
    after = Quarantine.of(decided(digests, kept=[3]), classes=3, root=ROOT, before=before)
    assert [(e.index, e.status) for e in after.entries] == [(1, "quarantined"), (3, "restored"), (5, "quarantined")]
    assert after.entries[1].history == before.entries[1].history
    assert (after.mask(6) == decided(digests, kept=[3]).kept).all()
    again = Quarantine.of(decided(digests, kept=[3]), classes=3, root=ROOT, before=after)
    assert again == after


def test_a_restored_row_that_a_run_left_out_all_the_same_is_quarantined():
    after = Quarantine.of(decided(), classes=3, root=ROOT, before=quarantine().restore([3]))
    assert after == quarantine()


def test_entries_are_selected_by_filter_and_class():
    made = quarantine()
    assert [e.index for e in made.selected()] == [1, 3, 5]
    assert [e.index for e in made.selected(by="spectral")] == [5, 3]
    assert [e.index for e in made.selected(by="spectral", label=0)] == [3]
    with pytest.raises(ValueError, match="no filter is called 'knn'; there are: spectral, aum"):
        made.selected(by="knn")
    with pytest.raises(ValueError, match="class 3 is none of 0 to 2"):
        made.selected(label=3)


@given(st.sets(st.sampled_from([1, 3, 5])), st.booleans(), st.text(max_size=20), st.none() | st.just(ROOT))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_what_is_read(tmp_path, indices, digests, reason, root):
    made = quarantine(digests, root).restore(indices, reason=reason)
    made.write(tmp_path / "quarantine.json")
    assert Quarantine.read(tmp_path / "quarantine.json") == made
    assert Quarantine.read(tmp_path) == made
    assert os.listdir(tmp_path) == ["quarantine.json"]
    assert made.mask(6).sum() == 3 + len(indices)


def test_a_quarantine_may_be_empty(tmp_path):
    empty = Quarantine.of(decided(kept=[1, 3, 5]), classes=3)
    empty.write(tmp_path / "q.json")
    assert Quarantine.read(tmp_path / "q.json") == empty
    assert empty.mask(6).all()


def changed(key, value, entry=None, event=None):
    def change(state):
        target = state if entry is None else state["entries"][entry]
        target = target if event is None else target["history"][event]
        target[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed("format", "x"), "this is no quarantine"),
        (changed("version", 2), "version 2 of its format is not known, only 1"),
        (changed("version", True), "quarantine.version must be 1"),
        (changed("extra", 1), "the quarantine lacks or has too much: extra"),
        (lambda state: state.pop("rows"), "the quarantine lacks or has too much: rows"),
        (changed("root", "AB" * 32), "quarantine.root must be 64 lower-case hex digits"),
        (changed("rows", -1), "quarantine.rows must be a whole number"),
        (changed("rows", 4), "quarantine.entries must ascend and lie below 4, got 5"),
        (changed("classes", 2), "row 5 has label 2 of 2"),
        (changed("entries", {}), "quarantine.entries must be a list"),
        (changed("index", 5, entry=0), "quarantine.entries must ascend"),
        (changed("index", True, entry=0), "entry.index must be a whole number"),
        (changed("label", 1.0, entry=0), "entry.label must be a whole number"),
        (changed("sha256", "x", entry=0), "entry.sha256 must be 64"),
        (changed("sha256", None, entry=0), "must all have a sha256, or none"),
        (changed("filters", "aum", entry=0), "entry.filters must be a list"),
        (changed("filters", ["\x1b[2J"], entry=0), "is no name of a filter"),
        (changed("scores", [1], entry=0), "entry.scores must be a dict"),
        (changed("scores", {"aum": "high"}, entry=0), "must be a finite number"),
        (changed("decision", "keep", entry=0), "entry.decision must be quarantine or drop"),
        (changed("status", [], entry=0), "entry.status must be quarantined or restored"),
        (changed("extra", 1, entry=0), "an entry lacks or has too much: extra"),
        (changed("history", None, entry=0), "entry.history must be a list"),
        (changed("reason", 7, entry=1, event=0), "event.reason must be a text"),
        (changed("reason", "x" * 2001, entry=1, event=0), "event.reason must be a text of at most 2000"),
        (changed("extra", 7, entry=1, event=0), "an event lacks or has too much: extra"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(tmp_path, change, says):
    path = tmp_path / "q.json"
    quarantine().restore([3]).write(path)
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=says) as caught:
        Quarantine.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_json_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "quarantine.json"
    with pytest.raises(ValueError, match="no such file"):
        Quarantine.read(tmp_path)
    for text, says in (("{", "Expecting"), ("[]", "no quarantine"), ('{"a": Infinity}', "not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            Quarantine.read(path)
    monkeypatch.setattr("robust_train.poisoning.quarantine.LARGEST", 3)
    path.write_text("{    }")
    with pytest.raises(ValueError, match="larger than 3 bytes"):
        Quarantine.read(path)


def test_history_holds_events_only():
    with pytest.raises(ValueError, match="entry.history must hold events only"):
        replace(quarantine().entries[0], history=({"what": "restored"},))
