"""Tensors in files, and adversarial examples among them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_train import PGD, AdversarialExamples, ClassifierVictim, Threat, UniformNoise
from robust_train.evasion._tensors import NAMES, read_tensors, write_tensors
from robust_train.evasion.evaluate import judge
from robust_train.evasion.examples import LARGEST, adversarial_examples


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(sorted(NAMES, key=str)), shape=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0)
)
def test_what_is_written_is_read(dtype, shape, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    generator = torch.Generator().manual_seed(seed % 2**32)
    tensor = (torch.rand(shape, generator=generator) * 100).to(dtype)
    write_tensors(path, {"a": tensor, "b/c": tensor.T if tensor.ndim == 2 else tensor}, {"says": "ü"})
    found, about = read_tensors(path, 10**6)
    assert about == {"says": "ü"}
    assert found["a"].dtype == dtype
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["b/c"], tensor.T if tensor.ndim == 2 else tensor)


def test_the_bytes_are_those_of_the_format(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.tensor([[1.0, 2.0]]), "n": torch.tensor([3])}, {})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["x"] == {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
    assert header["n"] == {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]}
    assert content[8 + length :] == bytes.fromhex("0000803f00000040") + (3).to_bytes(8, "little")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]  # no draft is left


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        (2**60).to_bytes(8, "little"),
        (3).to_bytes(8, "little") + b"{a}",
        (2).to_bytes(8, "little") + b"[]",
        b"PK\x03\x04" * 20,
        *(
            len(text).to_bytes(8, "little") + text + b"\x00" * 8
            for text in (
                b'{"x": 3}',
                b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
                b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 0]}}',
                b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}',
                b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
                b'{"x": {"dtype": "code", "shape": [2], "data_offsets": [0, 8]}}',
            )
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.safetensors") as stopped:
        read_tensors(path, 10**6)
    assert "\n" not in str(stopped.value)


def test_files_that_are_missing_or_too_large(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_tensors(tmp_path / "nowhere", 10**6)
    write_tensors(tmp_path / "large", {"x": torch.zeros(100)}, {})
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_tensors(tmp_path / "large", 100)


def test_complex_numbers_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex64)}, {})


# --- adversarial examples ------------------------------------------------------------------------------------------


@pytest.fixture
def kept(net, images) -> AdversarialExamples:
    labels = net(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # one clean mistake
    victim, threat = ClassifierVictim(net, labels, stop_when_fooled=True), Threat(eps=0.1)
    verdicts = judge(victim, images, threat, {"noise": UniformNoise(), "pgd": PGD(steps=10)}, 0)
    tensors = adversarial_examples(victim, images, verdicts.adversarial, verdicts.attacked, verdicts.clean)
    return AdversarialExamples.of(tensors, ["noise", "pgd"], threat.describe())


def test_each_example_names_the_first_attack_that_succeeded(kept, net, images):
    assert kept.attack[0] == "clean"
    assert {"pgd", "none"} <= set(kept.attack) <= {"clean", "pgd", "noise", "none"}
    assert torch.equal(kept.inputs, images)
    assert torch.equal(kept.predictions, net(kept.adversarial).argmax(1))
    assert torch.equal(kept.clean_predictions, net(images).argmax(1))
    stood = torch.tensor([attack == "none" for attack in kept.attack])
    assert torch.equal(kept.predictions == kept.labels, stood)
    assert float(Threat(eps=0.1).size(kept.adversarial, images).max()) <= 0.1 * (1 + 1e-6)


def test_they_come_back_from_a_file(kept, tmp_path):
    kept.write(tmp_path / "kept.safetensors")
    again = AdversarialExamples.read(tmp_path / "kept.safetensors")
    assert again.attack == kept.attack
    assert again.threat == kept.threat
    for name in ("inputs", "adversarial", "labels", "predictions", "clean_predictions"):
        assert torch.equal(getattr(again, name), getattr(kept, name))
    write_tensors(tmp_path / "other", {"x": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="no adversarial examples"):
        AdversarialExamples.read(tmp_path / "other")


def test_a_file_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr("robust_train.evasion.examples.LARGEST", 2**16 + 5000)
    rows = torch.zeros(100, 64)
    numbers = torch.zeros(100, dtype=torch.int64)
    AdversarialExamples(rows, rows, numbers, numbers, numbers, ("none",) * 100, "").write(tmp_path / "a")
    assert len(AdversarialExamples.read(tmp_path / "a").inputs) == 9
    assert LARGEST == 2**28
