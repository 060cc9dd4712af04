"""A long evaluation in parts on disk: what was judged once is not judged again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robust_train.evasion._tensors import as_bytes, read_tensors, write_bytes, write_tensors
from robust_train.evasion.outcomes import Outcomes

PLAN = "plan.json"
LARGEST = 2**32  # bytes of a shard
FORMAT = "robust-train evaluation 1"


def model_digest(model: nn.Module) -> str:
    """sha256 of a model's parameters and buffers with their names, and of its layers as they print themselves.

    What a layer's code does is not seen: after a change of code use another folder.
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def data_digest(*parts: Any) -> str:
    """sha256 of tensors and plain builtins, such as a batch's inputs and labels."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(as_bytes(part))
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()


def settings_text(value: Any) -> Any:
    """Settings such as attacks by name as plain builtins that differ where the settings do.

    Raises:
        ValueError: a part of them, such as a lambda, has no name by which it could be known again.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": _name(type(value)), **{f.name: settings_text(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, nn.Module):
        return {"module": model_digest(value)}
    if isinstance(value, Tensor):
        return {"tensor": data_digest(value)}
    if isinstance(value, Mapping):
        return {str(key): settings_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [settings_text(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value) and "<" not in _name(value):
        return {"function": _name(value)}
    raise ValueError(
        f"shards: {value!r:.80} has no name by which it could be known again: give a dataclass or a named function"
    )


class Shards:
    """A folder with a plan of the evaluation and one file a batch.

    Args:
        folder: made where it is missing.
        plan: what the numbers depend on, as plain builtins; digests of models, settings of attacks.

    Raises:
        ValueError: the folder holds another evaluation; the message names what differs.

    Guarantees:
        A file is there whole or not at all. Shards of another model, threat, attack, seed or data are never used.
    """

    def __init__(self, folder: str | Path, plan: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        asked = json.loads(json.dumps({"format": FORMAT, **plan}))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if any(self.folder.glob("shard-*")):
                raise ValueError(f"shards: {self.folder} has shards and no {PLAN}: choose another folder") from None
            write_bytes(self.folder / PLAN, (json.dumps(asked, indent=2) + "\n").encode())
        except (OSError, ValueError) as error:
            raise ValueError(f"shards: {self.folder / PLAN} cannot be read: {error}") from None
        else:
            known = found if isinstance(found, dict) else {}
            if differ := [key for key in {**asked, **known} if asked.get(key) != known.get(key)]:
                raise ValueError(
                    f"shards: {self.folder} holds an evaluation with another {_and(differ)}: choose another folder, or "
                    "remove this one"
                )
        self.reused = 0

    def judged(self, name: str, digest: str, judge: Callable[[], Outcomes]) -> Outcomes:
        """The outcomes of one batch: those on disk, or else what ``judge()`` returns, which is then put there.

        Args:
            name: of the batch, the same in every run.
            digest: of its data.
            judge: runs the attacks.

        Raises:
            ValueError: the shard on disk is of other data, or damaged.
        """
        path = self.folder / f"shard-{name}.safetensors"
        if path.exists():
            tensors, about = read_tensors(path, LARGEST)
            if about.get("data") != digest:
                raise ValueError(
                    f"shards: {path} is of other data than batch {name} is now: the data set, the batch size or their "
                    "order changed; choose another folder, or remove this one"
                )
            try:
                outcomes = Outcomes.from_tensors(tensors, about)
            except ValueError as error:
                raise ValueError(f"shards: {path}: {error}; remove it") from None
            self.reused += 1
            return outcomes
        outcomes = judge()
        tensors, about = outcomes.as_tensors()
        write_tensors(path, tensors, {**about, "data": digest, "format": FORMAT})
        return outcomes


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else f"<{value!r}>"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
