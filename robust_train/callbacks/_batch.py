"""Find and replace the inputs and the labels in a batch of any structure, without writing into the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

Path = tuple[str | int, ...]
INPUT_NAMES = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "features", "data")
LABEL_NAMES = ("y", "label", "labels", "target", "targets", "class", "mask", "masks")


def find_input(batch: Any, inputs: str | int | Path | None = None) -> Path:
    """Where the tensor lies that an attacker may change.

    Args:
        batch: what the training step receives.
        inputs: an index, a name, a dotted path (``"views.0"``), or None for the rule: a tensor named like one of
            ``INPUT_NAMES``, else the first tensor with at least two dimensions, else the first tensor.

    Raises:
        ValueError: there is no such place, or no tensor there; the message lists the places that there are.
    """
    places = list(_tensors(batch))
    if inputs is not None:
        return _named(batch, inputs, places, "inputs")
    named = [path for path, _ in places if path and str(path[-1]).lower() in INPUT_NAMES]
    wide = [path for path, tensor in places if tensor.ndim >= 2]
    for candidates in (named, wide, [path for path, _ in places]):
        if candidates:
            return candidates[0]
    raise ValueError(f"the batch ({type(batch).__name__}) holds no tensor that could be attacked")


def label_candidates(batch: Any, input_path: Path, labels: str | int | Path | None = None) -> tuple[Path, ...]:
    """Where the labels may lie, the likeliest first: as told and nowhere else; or tensors named like ``LABEL_NAMES``,
    in that order, then integer tensors, then others, those after the input before those in front of it.

    Raises:
        ValueError: ``labels`` names no tensor.
    """
    places = list(_tensors(batch))
    if labels is not None:
        return (_named(batch, labels, places, "labels"),)
    order = [path for path, _ in places]

    def rank(place: tuple[Path, Tensor]) -> tuple[int, bool, bool]:
        path, tensor = place
        name = str(path[-1]).lower() if path else ""
        named = LABEL_NAMES.index(name) if name in LABEL_NAMES else len(LABEL_NAMES)
        return named, tensor.is_floating_point(), order.index(path) < order.index(input_path)

    return tuple(path for path, _ in sorted(places, key=rank) if path != input_path)


def get(batch: Any, path: Path) -> Any:
    """The value at ``path``."""
    for key in path:
        batch = _child(batch, key)
    return batch


def replaced(batch: Any, path: Path, value: Any) -> Any:
    """A batch with ``value`` at ``path``: new containers along the path, everything else shared with the old one."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    new = replaced(_child(batch, key), rest, value)
    if isinstance(batch, tuple):
        items = [new if i == key or _field(batch, i) == key else item for i, item in enumerate(batch)]
        return _rebuilt_tuple(batch, items)
    out = copy.copy(batch)
    if isinstance(batch, (Mapping, list)):
        out[key] = new  # type: ignore[index]
    else:
        object.__setattr__(out, str(key), new)  # also when the dataclass is frozen
    return out


def write_back(batch: Any, sent: Any, path: Path, value: Any) -> None:
    """What a step wrote into the containers that ``replaced(batch, path, value)`` exchanged goes into the user's."""
    if not path:
        return
    key, rest = path[0], path[1:]
    old, new = dict(_children(batch)), dict(_children(sent))
    if rest and key in new:
        write_back(old[key], new[key], rest, value)
    if isinstance(batch, tuple):  # nothing can be written into one
        return
    for k, v in new.items():
        exchanged = k == key and (v is value if not rest else type(v) is type(old[k]))
        if not exchanged and (k not in old or old[k] is not v):
            if isinstance(batch, (list, MutableMapping)):
                batch[k] = v  # type: ignore[index]
            else:
                object.__setattr__(batch, str(k), v)
    if isinstance(batch, MutableMapping):
        for k in old.keys() - new.keys():
            del batch[k]


def fresh(batch: Any) -> Any:
    """A batch that the user's code may write into: containers and tensors are copies, all else is shared."""
    return _mapped(batch, lambda t: t.clone(), {}, list)


def take(batch: Any, index: Tensor, size: int) -> Any:
    """The batch restricted to some of its ``size`` examples: rows of every tensor and list of that length."""

    def rows(t: Tensor) -> Tensor:
        return t[index.to(t.device)] if t.ndim and t.shape[0] == size else t

    def items(values: list[Any]) -> list[Any]:
        return [values[i] for i in index.tolist()] if len(values) == size else values

    return _mapped(batch, rows, {}, items)


def _mapped(
    value: Any, on_tensor: Callable[[Tensor], Tensor], seen: dict[int, Any], on_list: Callable[[list[Any]], Any]
) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor):
        out: Any = on_tensor(value)
    elif isinstance(value, tuple):
        out = _rebuilt_tuple(value, [_mapped(v, on_tensor, seen, on_list) for v in value])
    elif isinstance(value, list):
        nested = any(isinstance(v, (Tensor, list, tuple, Mapping)) for v in value)
        out = [_mapped(v, on_tensor, seen, on_list) for v in value] if nested else on_list(value)
    elif isinstance(value, MutableMapping):
        out = copy.copy(value)
        for k in list(out):
            out[k] = _mapped(out[k], on_tensor, seen, on_list)
    elif _is_record(value):
        out = copy.copy(value)
        for k in _record_fields(value):
            object.__setattr__(out, k, _mapped(getattr(value, k), on_tensor, seen, on_list))
    else:
        return value
    seen[id(value)] = out
    return out


def _rebuilt_tuple(old: tuple[Any, ...], items: list[Any]) -> Any:
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def _is_record(value: Any) -> bool:
    """A dataclass or another plain object with attributes, as custom batch types are."""
    if isinstance(value, (type, nn.Module, str, bytes, Mapping)) or callable(value):
        return False
    return hasattr(value, "__dataclass_fields__") or (hasattr(value, "__dict__") and bool(vars(value)))


def _record_fields(value: Any) -> list[str]:
    return list(getattr(value, "__dataclass_fields__", None) or vars(value))


def _children(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if _is_record(value):
        return [(name, getattr(value, name)) for name in _record_fields(value)]
    return []


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    else:
        for key, child in _children(value):
            yield from _tensors(child, (*path, key))


def _field(batch: tuple[Any, ...], i: int) -> str | None:
    return batch._fields[i] if hasattr(batch, "_fields") else None  # type: ignore[attr-defined]


def _child(batch: Any, key: str | int) -> Any:
    if isinstance(batch, (list, Mapping)) or (isinstance(batch, tuple) and isinstance(key, int)):
        return batch[key]  # type: ignore[index]
    return getattr(batch, str(key))


def _named(batch: Any, asked: str | int | Path, places: list[tuple[Path, Tensor]], setting: str) -> Path:
    if isinstance(asked, (int, str)):
        tries: list[Path] = [(asked,)]
        if isinstance(asked, str):
            tries.append(tuple(int(part) if part.lstrip("-").isdigit() else part for part in asked.split(".")))
    else:
        tries = [tuple(asked)]
    for path in tries:
        try:
            found = get(batch, path)
        except (KeyError, IndexError, AttributeError, TypeError):
            continue
        if isinstance(found, Tensor):
            if any(place == path for place, _ in places):
                return path
            # an index into a named tuple, or a negative one, becomes the place's usual name
            return next((place for place, tensor in places if tensor is found), path)
    known = ", ".join(".".join(map(str, path)) or "the batch itself" for path, _ in places) or "none"
    raise ValueError(f"{setting}={asked!r} names no tensor of the batch; there are: {known}")
