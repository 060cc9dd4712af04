"""Digests of examples: different examples differ, equal ones agree, and the fast path changes nothing."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, random_split

from robust_train.custody import digest as module
from robust_train.custody.digest import DOMAIN, digest, digests


class Pair(NamedTuple):
    x: Any
    y: Any


class Couple(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Example:
    x: Any
    y: Any


DISTINCT = [
    *(None, True, False, 0, 1, -1, 255, 256, -128, 128, 2**64, -(2**64), 10**5000),
    *(0.0, -0.0, 1.0, float("nan"), float("inf"), 5e-324),
    *("", "1", "a", "\0", "é", "e\u0301", "\udc80", b"", b"1", b"a", b"\0"),
    *((), [], {}, (1,), [1], {1: 1}, {1: None}, {"1": 1}, {1: "1"}, {1: 1, 2: 2}, {1: 2, 2: 1}),
    *((1, "1"), ("1", 1), ((1,), 2), (1, (2,)), ((1, 2),), (1, 2), (1, 2, None), ((), ()), ((), ((),)), (((),), ())),
    *(("ab", "c"), ("a", "bc"), ("abc",), (b"ab", b"c"), (b"a", b"bc")),
    *(Pair(1, 2), Couple(1, 2), Pair(2, 1), Example(1, 2), Example(2, 1), {"x": 1, "y": 2}),
    *(torch.tensor(1), torch.tensor([1]), torch.tensor([[1]]), torch.tensor(1.0), torch.tensor(True)),
    *(torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(1, dtype=torch.int8)),
    *(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0, dtype=torch.float16), torch.tensor(1 + 0j)),
    *(torch.arange(6), torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2), torch.arange(6).reshape(1, 6)),
    *(torch.empty(0), torch.empty(0, 3), torch.empty(3, 0), torch.empty(0, dtype=torch.int64)),
    *(
        np.array(1),
        np.array([1]),
        np.array(1.0),
        np.array(True),
        np.int64(1),
        np.float64(1),
        np.float32(1),
        np.bool_(1),
    ),
    *(np.arange(6), np.arange(6).reshape(2, 3), np.empty(0), np.empty((0, 3))),
    *(np.array("a"), np.array(b"a"), np.str_("a"), np.str_(""), np.str_("\0"), np.bytes_(b"a"), np.bytes_(b"\0")),
    *(np.datetime64("2024-01-01"), np.datetime64("2024-01-01", "s"), np.timedelta64(1, "D")),
]


def test_different_examples_have_different_digests():
    seen = collections.defaultdict(list)
    for value in DISTINCT:
        seen[digest(value)].append(value)
    assert [values for values in seen.values() if len(values) > 1] == []


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
nested = st.recursive(
    scalars | st.lists(st.integers(0, 3), max_size=4).map(lambda v: torch.tensor(v, dtype=torch.uint8)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 2), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
        | st.tuples(inner, inner).map(lambda pair: Example(*pair))
    ),
    max_leaves=8,
)


def shown(value: Any) -> Any:
    """A text that tells any two of the samples apart: types, signs of zero and the bits of each float."""
    if isinstance(value, dict):
        return ("dict", sorted((repr(key), shown(item)) for key, item in value.items()))
    if isinstance(value, Example):
        return ("Example", shown(value.x), shown(value.y))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, [shown(item) for item in value])
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    return (type(value).__name__, value.hex() if isinstance(value, float) else value)


@given(nested, nested)
def test_digests_agree_exactly_where_examples_do(a, b):
    nan = "nan" in repr((a, b))  # of which there are many, alike in print
    assume(not nan)
    assert (digest(a) == digest(b)) == (repr(shown(a)) == repr(shown(b)))


@given(st.lists(scalars, max_size=4), st.lists(scalars, max_size=4))
def test_no_encoding_is_the_beginning_of_another(a, b):
    encodings = []
    for value in (a, b):
        out: list[bytes] = []
        module._encode(value, ("example",), out)
        encodings.append(b"".join(out))
    assert encodings[0] == encodings[1] or not encodings[1].startswith(encodings[0])


def test_what_does_not_count():
    x = torch.randn(4, 6)
    assert digest(x) == digest(x.clone().requires_grad_()) == digest(x.t().contiguous().t())
    assert digest(x[:, ::2]) == digest(x[:, ::2].contiguous())
    assert digest(torch.zeros(3).expand(2, 3)) == digest(torch.zeros(2, 3))
    assert digest(torch.nn.Parameter(x)) == digest(x)
    assert digest(torch.tensor([1 + 2j]).conj()) == digest(torch.tensor([1 - 2j]))
    assert digest({"a": 1, 2: "b"}) == digest({2: "b", "a": 1}) == digest(collections.OrderedDict({2: "b", "a": 1}))
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert digest(array) == digest(np.asfortranarray(array)) == digest(array.astype(">i4"))


def test_the_digest_is_that_of_the_documented_bytes():
    """It must never change: recorded manifests hold it."""
    assert digest((1, "é")) == hashlib.sha256(DOMAIN + b"T\x01\x02" + b"I\x01\x01\x01" + b"S\x01\x02\xc3\xa9").digest()
    row = (torch.tensor([[1, 2]], dtype=torch.uint8), torch.tensor(3))
    image = b"tS\x01\x0btorch.uint8" + b"\x01\x02" + b"\x01\x01" + b"\x01\x02" + b"\x01\x02"
    label = b"tS\x01\x0btorch.int64" + b"\x00" + (3).to_bytes(8, "little")
    assert digest(row) == hashlib.sha256(DOMAIN + b"T\x01\x02" + image + label).digest()


def test_images_count_with_mode_size_and_palette():
    image = pytest.importorskip("PIL.Image")
    grey = image.new("L", (2, 3), 5)
    red, blue = image.new("P", (2, 3), 1), image.new("P", (2, 3), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    blue.putpalette([0, 0, 0, 0, 0, 255])
    clear = red.copy()
    clear.info["transparency"] = 0
    different = [grey, image.new("L", (3, 2), 5), image.new("L", (2, 3), 6), grey.convert("RGB"), red, blue, clear]
    assert len({digest(each) for each in different}) == len(different)
    assert digest(grey) == digest(grey.copy())


def itself() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ((1, {"boxes": {3}}), r"example\[1\]\['boxes'\] is of type set, for which no digest is defined: use tensors"),
        (Example(1, object()), r"example\['y'\] is of type object"),
        ({(1, object()): 2}, r"example\['a key'\]\[1\] is of type object"),
        (Example, "is of type type"),
        (torch.eye(2).to_sparse(), "sparse, quantized or nested tensor"),
        (torch.empty(2, device="meta"), "without data"),
        (np.array([object()]), "array of dtype object"),
        (np.zeros(2, dtype=[("a", "i1"), ("b", "i4")]), "array of dtype"),
        (np.zeros(2, dtype=np.longdouble), "array of dtype"),
        (np.ma.masked_array([1, 2], [True, False]), "masked array"),
        (itself(), "example is nested more than 64 levels deep, or contains itself"),
    ],
)
def test_what_has_no_digest_is_named_with_its_place(value, says):
    with pytest.raises(TypeError, match=says):
        digest(value)


# --- datasets -------------------------------------------------------------------------------------------------------


class Slow(Dataset):
    """The same rows, through ``[i]`` alone."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def tensors(n: int = 50) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 1, 3, 4, generator=g), torch.randint(0, 9, (n,), generator=g))


def is_fast(dataset) -> bool:
    return module._in_memory(dataset) is not None


dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool, torch.complex64]
)


@given(st.data())
def test_the_fast_path_gives_the_same_digests(data):
    n = data.draw(st.integers(0, 9))
    columns = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        columns.append((10 * torch.rand(n, *shape)).to(data.draw(dtypes)))
    dataset: Any = TensorDataset(*columns)
    for _ in range(data.draw(st.integers(0, 3))):
        if not len(dataset):
            break
        dataset = Subset(dataset, data.draw(st.lists(st.integers(-len(dataset), len(dataset) - 1), max_size=12)))
    assert is_fast(dataset)
    assert digests(dataset) == [digest(dataset[i]) for i in range(len(dataset))] == digests(Slow(dataset))


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_chunks_do_not_show(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    dataset = tensors()
    assert digests(dataset) == digests(Slow(dataset))
    parts = random_split(dataset, [30, 20])
    assert is_fast(parts[1])
    assert digests(parts[1]) == digests(Slow(parts[1]))


def subsets() -> list[tuple[Any, bool]]:
    x, y = tensors().tensors
    base = tensors()
    return [
        (Subset(base, torch.tensor([3, 1, -1])), True),  # pyright: ignore[reportArgumentType]
        (Subset(base, range(5, 20, 3)), True),
        (Subset(base, np.array([3, 1])), False),  # pyright: ignore[reportArgumentType]
        (TensorDataset(x.transpose(2, 3), y), False),
        (TensorDataset(x.clone().requires_grad_(), y), True),
        (TensorDataset(torch.nn.Parameter(x), y), False),
        (TensorDataset(torch.zeros(1, 2).expand(50, 2), y), False),
        ([base[i] for i in range(50)], False),
    ]


@pytest.mark.parametrize("case", range(len(subsets())))
def test_what_is_read_in_place_and_what_row_by_row(case):
    dataset, fast = subsets()[case]
    assert is_fast(dataset) == fast
    assert digests(dataset) == [digest(dataset[i]) for i in range(len(dataset))]


def test_a_subclass_is_asked_for_its_rows():
    class Inverted(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return 1 - x, y

    dataset = Inverted(*tensors().tensors)
    assert not is_fast(dataset)
    assert not is_fast(Subset(dataset, [0]))
    assert digests(dataset)[0] == digest(dataset[0]) != digest(tensors()[0])


def test_an_index_out_of_range_is_an_error_not_a_row():
    with pytest.raises(IndexError):
        digests(Subset(tensors(5), [1, 5]))


def test_one_bit_changes_one_digest():
    dataset = tensors()
    before = digests(dataset)
    dataset.tensors[0][7, 0, 1, 1] += 1e-6
    after = digests(dataset)
    assert [i for i in range(50) if before[i] != after[i]] == [7]


def test_progress_and_visits(monkeypatch):
    monkeypatch.setattr(module, "OFTEN", 20)
    seen: list[tuple[int, int]] = []
    rows: list[tuple[int, int]] = []
    for dataset in (tensors(), Slow(tensors())):
        digests(dataset, lambda done, count: seen.append((done, count)), lambda i, e: rows.append((i, int(e[1]))))
    assert seen == [(20, 50), (40, 50), (50, 50)] * 2
    assert rows == list(enumerate(tensors().tensors[1].tolist())) * 2


def test_random_augmentation_is_refused():
    class Augmented(Slow):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + torch.rand(())

    with pytest.raises(ValueError, match=r"dataset\[0\] differs between two readings: leave out random transforms"):
        digests(Augmented(tensors()))


def test_a_dataset_without_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1])

    with pytest.raises(TypeError, match="Stream has no length"):
        digests(Stream())


def test_an_error_names_the_row():
    with pytest.raises(TypeError, match=r"dataset\[2\]\[0\] is of type set"):
        digests([1, 2, ({3},)])


def test_plain_examples_need_no_torch():
    code = "import sys; from robust_train.custody.digest import digest; digest((1, 'a')); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
