"""The manifest: what it records, its file, and what it finds out."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from robust_train.custody import manifest as module
from robust_train.custody.difference import Difference
from robust_train.custody.digest import digest
from robust_train.custody.manifest import Manifest, Part, compare
from robust_train.custody.merkle import merkle_root

ABOUT: dict[str, Any] = {"source": "a shop", "licence": "MIT", "acquired": "2024-02-29"}


def data(n: int = 30) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 1, 4, 4, generator=g), torch.arange(n) % 3)


def label_of(example) -> int:
    return int(example[1])


def whole(**changes) -> Manifest:
    return Manifest.of(data(), label_of=label_of, schema={"shape": [1, 4, 4], "range": [0, 1.0]}, **ABOUT, **changes)


@pytest.fixture
def path(tmp_path):
    whole(overrides=["data=digits"]).write(tmp_path / "m.json")
    return tmp_path / "m.json"


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_it_records_each_row_and_where_the_rows_came_from():
    m = whole(overrides=["data=digits"])
    rows = [digest(data()[i]) for i in range(30)]
    assert m.digests == tuple(row.hex() for row in rows)
    assert m.root == merkle_root(rows).hex()
    assert (m.count, m.version) == (30, 1)
    assert m.classes == {"0": 10, "1": 10, "2": 10}
    assert (m.source, m.licence, m.acquired) == ("a shop", "MIT", "2024-02-29")
    assert m.parts == (Part("dataset", ("data=digits",), 30, "a shop", "MIT", "2024-02-29"),)
    assert m.schema == {"shape": [1, 4, 4], "range": [0, 1.0]}


def test_the_same_data_give_the_same_manifest():
    assert (
        whole()
        == whole()
        == Manifest.of([data()[i] for i in range(30)], label_of=label_of, schema=whole().schema, **ABOUT)
    )


def test_labels_may_be_texts_and_are_counted_in_any_dataset():
    rows = [("x", "cat"), ("y", "dog"), ("z", "cat")]
    assert Manifest.of(rows, label_of=lambda row: row[1]).classes == {"cat": 2, "dog": 1}
    assert Manifest.of(rows).classes == {}


def test_a_label_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"label_of must give a whole number or a text, got tensor\(0\) for row 0"):
        Manifest.of(data(), label_of=lambda example: example[1])


# --- growing --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 12), st.integers(0, 12))
def test_rows_added_are_as_if_they_had_been_there_from_the_start(a, b):
    both = data(a + b)
    first, second = Subset(both, range(a)), Subset(both, range(a, a + b))
    grown = Manifest.of(first, label_of=label_of, **ABOUT).extended(second, label_of=label_of, source="a friend")
    at_once = Manifest.of(ConcatDataset([first, second]), label_of=label_of)
    assert (grown.root, grown.digests, grown.count) == (at_once.root, at_once.digests, at_once.count)
    assert grown.classes == at_once.classes
    assert grown.source == "a shop; a friend"
    assert [part.count for part in grown.parts] == [a, b]
    assert compare(grown, at_once).equal


def test_only_the_added_rows_are_read():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    m = Manifest.of(Counted(range(1000)))
    Counted.reads = 0
    m.extended(Counted([1, 2, 3]))
    assert Counted.reads < 10


def test_files_and_examples_in_one_manifest(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    m = Manifest.of([1, 2]).joined(Manifest.of_folder(tmp_path)).extended([3])
    assert m.names == ("", "", "a.txt", "")
    assert m.digests[2] == digest(("a.txt", b"a")).hex()
    assert m.parts[1] == Part("folder", (str(tmp_path),), 1)


def test_schemas_must_agree():
    with pytest.raises(ValueError, match="the schema of the added rows must be that of the manifest"):
        whole().joined(Manifest.of([1], schema={"shape": []}))


# --- finding out ----------------------------------------------------------------------------------------------------


def found(dataset) -> Any:
    return compare(whole(), Manifest.of(dataset)).to_dict()


def rows(*numbers: int) -> list[dict[str, int]]:
    return [{"row": number} for number in numbers]


SAME = {"equal": True, "changed": [], "appeared": [], "vanished": [], "moved": []}


def test_one_pixel_names_its_row():
    dataset = data()
    dataset.tensors[0][17, 0, 2, 2] += 1 / 255
    assert found(dataset) == {**SAME, "equal": False, "changed": rows(17)}


def test_one_label_names_its_row():
    dataset = data()
    dataset.tensors[1][4] = 2
    assert found(dataset) == {**SAME, "equal": False, "changed": rows(4)}


def test_rows_taken_out_put_in_and_exchanged():
    everything = list(range(30))
    assert found(data()) == SAME
    assert found(Subset(data(), [i for i in everything if i not in (3, 9)])) == {
        **{**SAME, "equal": False},
        "vanished": rows(3, 9),
    }
    assert found(Subset(data(31), [*everything[:5], 30, *everything[5:]])) == {
        **{**SAME, "equal": False},
        "appeared": rows(5),
    }
    moved = found(Subset(data(), [*everything[1:], 0]))
    assert moved == {**SAME, "equal": False, "moved": [{"row": 0, "to": 29}]}


@given(st.permutations(range(8)))
def test_another_order_is_found_and_nothing_else_is(order):
    difference = compare(Manifest.of(list(range(8))), Manifest.of(order))
    assert difference.equal == (order == list(range(8)))
    assert difference == Difference(moved=difference.moved)


def test_a_file_that_changed_is_named(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    before = Manifest.of_folder(tmp_path)
    (tmp_path / "b").write_text("other")
    (tmp_path / "a").rename(tmp_path / "a2")
    difference = compare(before, Manifest.of_folder(tmp_path))
    assert difference.text() == "changed   1 (1 b)\nappeared  1 (0 a2)\nvanished  1 (0 a)"


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_same_manifest(tmp_path, path):
    assert Manifest.read(path) == whole(overrides=["data=digits"])
    assert os.listdir(tmp_path) == ["m.json"]
    lines = path.read_text().splitlines()
    assert sum(line.strip(' ",') in whole().digests for line in lines) == 30  # one a line, for diff and grep


@given(st.lists(st.text()), st.text(), st.dictionaries(st.text(), st.integers(-5, 5) | st.lists(st.text())))
def test_any_text_survives_the_file(tmp_path_factory, names, text, schema):
    path = tmp_path_factory.mktemp("m") / "m.json"
    m = replace(Manifest.of(names, source=text, overrides=[text], schema=schema), names=tuple(names))
    m.write(path)
    assert Manifest.read(path) == m


def test_a_failed_write_leaves_the_old_file(tmp_path, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Manifest.of([1]).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.json"]


HEX = "0" * 64
PART: dict[str, Any] = {"kind": "dataset", "arguments": [], "count": 30, "source": "", "licence": "", "acquired": ""}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "robust-train/privacy-certificate"}, "this is no manifest of data"),
        ({"version": 2}, "version 2 of its format is not known"),
        ({"version": True}, "manifest.version must be 1, got True"),
        ({"root": HEX}, "manifest.root is '0000"),
        ({"root": None}, "manifest.root is None"),
        ({"count": 31}, "manifest.count is 31, but there are 30 digests"),
        ({"count": 30.0}, "manifest.count must be a whole number"),
        ({"count": "30"}, "manifest.count must be a whole number"),
        ({"digests": [HEX] * 30}, "but the root of its digests is"),
        ({"digests": ["0" * 63] * 30}, r"manifest.digests\[0\] must be 64 lower-case hex digits"),
        ({"digests": ["A" * 64] * 30}, "64 lower-case hex digits"),
        ({"digests": [HEX + "\n"] * 30}, "64 lower-case hex digits"),
        ({"digests": [1] * 30}, "manifest.digests must be a list of texts"),
        ({"digests": HEX * 30}, "manifest.digests must be a list of texts"),
        ({"digests": []}, "manifest.count is 30, but there are 0"),
        ({"names": ["a"]}, "manifest.names must have one name a row or none, got 1 of 30"),
        ({"names": [None] * 30}, "manifest.names must be a list of texts"),
        ({"classes": {"0": -1}}, r"manifest.classes\['0'\] must be a whole number >= 0"),
        ({"classes": {"0": True}}, r"manifest.classes\['0'\] must be a whole number >= 0"),
        ({"classes": {"0": 31}}, "manifest.classes has more than 30 rows"),
        ({"classes": [1]}, "manifest.classes must be a dict"),
        ({"schema": None}, "manifest.schema must be a dict"),
        ({"parts": []}, "manifest.parts must be at least one"),
        ({"parts": [{**PART, "count": 29}]}, "have 30 rows together"),
        ({"parts": [{**PART, "count": -1}, {**PART, "count": 31}]}, "part.count must be a whole number"),
        ({"parts": [{**PART, "kind": "url"}]}, "part.kind must be one of dataset, folder"),
        ({"parts": [{**PART, "kind": []}]}, "part.kind must be one of dataset, folder"),
        ({"parts": [{**PART, "arguments": "data=digits"}]}, "part.arguments must be a list of texts"),
        ({"parts": [{**PART, "source": 1}]}, "part.source must be a text"),
        ({"parts": [{**PART, "acquired": "yesterday"}]}, "part.acquired must be a day such as 2024-12-31"),
        ({"parts": [{**PART, "acquired": "2024-02-30"}]}, "part.acquired must be a day"),
        ({"parts": [{**PART, "more": 1}]}, "a part must have the entries .*; wrong: more"),
        ({"parts": [1]}, "a part must be a dict"),
        ({"parts": {}}, "manifest.parts must be a list"),
        ({"more": 1}, "the manifest must have the entries .*; wrong: more"),
    ],
)
def test_a_wrong_file_is_one_clear_error(path, changes, says):
    with pytest.raises(ValueError, match=says) as raised:
        Manifest.read(edited(path, **changes))
    assert str(raised.value).startswith(f"{path}: ")
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["root", "digests", "parts", "schema", "version"])
def test_a_missing_entry_is_named(path, name):
    state = json.loads(path.read_text())
    del state[name]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=name):
        Manifest.read(path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff\xfe\xfa", b"[]", b"null", b"1", b'"text"', b"{", b"[" * 100_000, b'{"format": NaN}'),
        b'{"format": "robust-train/manifest", "format": "robust-train/manifest"}',
        b'{"format": "robust-train/manifest", "version": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest_is_one_clear_error(tmp_path, content):
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="m.json: ") as raised:
        Manifest.read(path)
    assert len(str(raised.value)) < 400


def test_infinity_does_not_come_in_as_a_large_number(path):
    path.write_text(path.read_text().replace('"range": [', '"range": [1e999, '))
    with pytest.raises(ValueError, match="manifest.schema must be a dict of what JSON can hold"):
        Manifest.read(path)


@given(st.data())
def test_no_damage_is_read_as_something_else(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m") / "m.json"
    m = Manifest.of([1, 2, 3], label_of=lambda i: i, **ABOUT)
    m.write(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(content.index(b'"digests"'), len(content) - 4))
    content[at] ^= data.draw(st.integers(1, 127))
    path.write_bytes(content)
    try:
        found = Manifest.read(path)
    except ValueError:
        return
    assert found == m  # it was white space


def test_a_file_that_is_too_large_or_none_is_refused(tmp_path, path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 100)
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        Manifest.read(path)
    for name in ("none.json", "."):
        with pytest.raises(ValueError, match="there is no such file"):
            Manifest.read(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="there is no such file"):
        Manifest.read(tmp_path / "pipe")


@pytest.mark.parametrize("schema", [{"a": (1, 2)}, {"a": float("nan")}, {"a": {1}}, {1: 2}, [1]])
def test_a_schema_is_what_json_can_hold(schema):
    with pytest.raises(ValueError, match="manifest.schema must be a dict of what JSON can hold"):
        Manifest.of([1], schema=schema if isinstance(schema, dict) else {"a": object()})
