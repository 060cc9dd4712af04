"""SHA-256 of training examples: of everything in them, so that no two different examples share a digest."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DOMAIN = b"robust-train/example/1\n"
DEEPEST = 64  # levels of nesting
READ_TWICE = 8  # rows
CHUNK = 1 << 20  # bytes that are laid out at a time
OFTEN = 1024  # rows between two reports of progress

Progress = Callable[[int, int], None]


def digest(example: Any) -> bytes:
    """SHA-256 of one example, whatever it is made of.

    Args:
        example: None, bool, int, float, str, bytes, torch tensors, numpy arrays and scalars, PIL images, and tuples,
            lists, dicts (their order does not count), named tuples and dataclasses (their fields) of these. Subclasses
            of tuple, list, dict and Tensor count as what they derive from. Of a tensor count dtype, shape and values,
            not its device, memory layout or ``requires_grad``; of an array likewise, and not its byte order; of an
            image mode, size, pixels, palette and transparency.

    Returns:
        32 bytes.

    Raises:
        TypeError: something in it is of another kind; says what, and where.

    Guarantees:
        Each kind has its own tag and states its own length, so that one encoding belongs to one value:
        ``(1, "1")``, ``("1", 1)``, ``((1,), 2)`` and ``(1, (2,))`` differ, as do ``1``, ``1.0`` and ``True``, ``0.0``
        and ``-0.0``, a float32 and a float64 of the same value.
    """
    return _digest(example, "example")


def digests(
    dataset: Any, progress: Progress | None = None, visit: Callable[[int, Any], None] | None = None
) -> list[bytes]:
    """Digests of all examples of a dataset, in order.

    Args:
        dataset: has ``len(dataset)`` and ``dataset[i]``, and gives the same example each time.
        progress: called with the number of rows done and of all rows, now and then and at the end.
        visit: called with the number and the example of each row, in order.

    Raises:
        TypeError: the dataset has no length, or an example is of a kind that ``digest`` does not know.
        ValueError: one of the first rows differs between two readings, as it does under random augmentation.

    Guarantees:
        ``digests(dataset)[i] == digest(dataset[i])``, also for a ``TensorDataset`` and subsets of it, for which the
        bytes are read where they lie.
    """
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError):
        raise TypeError(
            f"{type(dataset).__name__} has no length: a dataset whose rows are to be recorded needs len() and [i]"
        ) from None
    report = progress if progress is not None else _no_report
    in_memory = _in_memory(dataset)
    if in_memory is None:
        _refuse_random(dataset, count)
        rows = _read_each(dataset, count, visit)
    else:
        rows = _read_memory(*in_memory, count)
    found = []
    for row in rows:
        if visit is not None and in_memory is not None:
            visit(len(found), dataset[len(found)])
        found.append(row)
        if len(found) % OFTEN == 0:
            report(len(found), count)
    report(count, count)
    return found


def _no_report(done: int, count: int) -> None:
    pass


def _read_each(dataset: Any, count: int, visit: Callable[[int, Any], None] | None) -> Iterator[bytes]:
    for index in range(count):
        example = dataset[index]
        if visit is not None:
            visit(index, example)
        yield _digest(example, f"dataset[{index}]")


def _refuse_random(dataset: Any, count: int) -> None:
    for index in range(min(count, READ_TWICE)):
        place = f"dataset[{index}]"
        if _digest(dataset[index], place) != _digest(dataset[index], place):
            raise ValueError(
                f"{place} differs between two readings: leave out random transforms (augmentation); "
                "what is recorded must be the data as they are stored"
            )


def head_of_file(name: str, size: int) -> bytes:
    """What stands before a file's content where ``digest((name, content))`` is computed piece by piece.

    Args:
        name: of the file.
        size: bytes of its content.
    """
    return DOMAIN + b"T" + _number(2) + _text(name) + b"Y" + _number(size)


# --- one example, as bytes ------------------------------------------------------------------------------------------


def _digest(example: Any, name: str) -> bytes:
    out = [DOMAIN]
    _encode(example, (name,), out)
    return hashlib.sha256(b"".join(out)).digest()


def _encode(value: Any, path: tuple[Any, ...], out: list[bytes]) -> None:
    """Append the encoding of ``value``, which no other value has and which is no beginning of another one."""
    if len(path) > DEEPEST:
        raise TypeError(f"{path[0]} is nested more than {DEEPEST} levels deep, or contains itself")
    scalar = _SCALARS.get(type(value))
    if scalar is not None:
        out.append(scalar(value))
    elif (encoded := _of_library(value, path)) is not None:
        out.extend(encoded)
    elif isinstance(value, tuple) and (names := getattr(value, "_fields", None)) is not None:
        _encode_fields(b"M", value, names, path, out)
    elif isinstance(value, (tuple, list)):
        out.append((b"T" if isinstance(value, tuple) else b"L") + _number(len(value)))
        for index, item in enumerate(value):
            _encode(item, (*path, index), out)
    elif isinstance(value, dict):
        out.append(b"D" + _number(len(value)))
        for key_bytes, key in sorted(((_key(key, path), key) for key in value), key=lambda pair: pair[0]):
            out.append(key_bytes)
            _encode(value[key], (*path, key), out)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _encode_fields(b"C", value, [field.name for field in dataclasses.fields(value)], path, out)
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise _no_digest(
            path,
            f"of type {kind}",
            "use tensors, arrays, numbers, text, and tuples, lists, dicts or dataclasses of them",
        )


def _encode_fields(tag: bytes, value: Any, names: Any, path: tuple[Any, ...], out: list[bytes]) -> None:
    out.append(tag + _text(type(value).__name__) + _number(len(names)))
    for name in names:
        out.append(_text(name))
        _encode(getattr(value, name), (*path, name), out)


def _key(key: Any, path: tuple[Any, ...]) -> bytes:
    out: list[bytes] = []
    _encode(key, (*path, "a key"), out)
    return b"".join(out)


def _number(n: int) -> bytes:
    """A count: how many bytes it takes, then those."""
    size = (n.bit_length() + 7) // 8
    return bytes((size,)) + n.to_bytes(size, "big")


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"S" + _number(len(raw)) + raw


def _integer(n: int) -> bytes:
    raw = n.to_bytes(n.bit_length() // 8 + 1, "big", signed=True)
    return b"I" + _number(len(raw)) + raw


_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda value: b"B\x01" if value else b"B\x00",
    int: _integer,
    float: lambda value: b"F" + struct.pack(">d", value),
    str: _text,
    bytes: lambda value: b"Y" + _number(len(value)) + value,
}


def _of_library(value: Any, path: tuple[Any, ...]) -> list[bytes] | None:
    """Encoding of a tensor, an array or an image. What was never imported cannot have made the value."""
    if "torch" in sys.modules:
        from torch import Tensor

        if isinstance(value, Tensor):
            return _encode_tensor(value, path)
    if "numpy" in sys.modules:
        from numpy import generic, ndarray

        if isinstance(value, (ndarray, generic)):
            return _encode_array(value, path)
    if "PIL.Image" in sys.modules and isinstance(value, sys.modules["PIL.Image"].Image):
        return _encode_image(value, path)
    return None


def _encode_tensor(tensor: Tensor, path: tuple[Any, ...]) -> list[bytes]:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise _no_digest(path, "a sparse, quantized or nested tensor", "convert it to a dense one")
    if tensor.is_meta:
        raise _no_digest(path, "a tensor without data (device meta)", "load its data")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return [_tensor_header(tensor.dtype, tensor.shape), flat.view(torch.uint8).numpy().tobytes()]


def _tensor_header(dtype: Any, shape: Any) -> bytes:
    return b"t" + _text(str(dtype)) + _shape(shape)


def _shape(shape: Any) -> bytes:
    return _number(len(shape)) + b"".join(map(_number, shape))


def _encode_array(array: Any, path: tuple[Any, ...]) -> list[bytes]:
    import numpy as np

    if isinstance(array, np.str_):
        return [b"g", _text(str.__str__(array))]  # str(array), and an array of it, would lose zeros at its end
    if isinstance(array, np.bytes_):
        return [b"g", _SCALARS[bytes](bytes(array))]
    if isinstance(array, np.ma.MaskedArray):
        raise _no_digest(path, "a masked array", "use its values and its mask, as two arrays")
    if array.dtype.kind not in "biufcSUmM" or array.dtype.char in "gG":  # records and long doubles have unused bytes
        raise _no_digest(path, f"an array of dtype {array.dtype}", "convert it to numbers or text of a fixed size")
    tag = b"g" if isinstance(array, np.generic) else b"a"
    values = np.asarray(array)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return [tag + _text(values.dtype.str) + _shape(values.shape), values.tobytes()]


def _encode_image(image: Any, path: tuple[Any, ...]) -> list[bytes]:
    pixels = image.tobytes()  # first: it also loads the palette
    palette = None if image.palette is None else (image.palette.mode, bytes(image.getpalette(None) or ()))
    out = [b"P" + _text(image.mode) + _shape(image.size) + _number(len(pixels)), pixels]
    _encode(palette, (*path, "palette"), out)
    _encode(image.info.get("transparency"), (*path, "transparency"), out)
    return out


def _no_digest(path: tuple[Any, ...], what: str, advice: str) -> TypeError:
    place = path[0] + "".join(f"[{part!r:.60}]" for part in path[1:])
    return TypeError(f"{place} is {what}, for which no digest is defined: {advice}")


# --- tensors that lie in memory -------------------------------------------------------------------------------------


def _in_memory(dataset: Any) -> tuple[list[Tensor], Tensor | None] | None:
    """Tensors of a ``TensorDataset`` and the rows that a chain of subsets takes of it; None for any other dataset."""
    if "torch" not in sys.modules:
        return None
    import torch
    from torch.utils.data import Subset, TensorDataset

    chain = []
    while type(dataset) is Subset:
        chain.append(_positions(dataset.indices))
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or any(positions is None for positions in chain):
        return None
    tensors = list(dataset.tensors)
    for tensor in tensors:
        plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.is_cpu
        if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
            return None
    rows, count = None, len(dataset)
    for positions in reversed(chain):
        if len(positions) and not (-count <= int(positions.min()) and int(positions.max()) < count):
            return None
        positions = positions.remainder(max(1, count))  # from the end where negative
        rows, count = positions if rows is None else rows[positions], len(positions)
    return tensors, rows


def _positions(indices: Any) -> Tensor | None:
    """Indices of a ``Subset`` as int64 ``(n,)``; None where they are anything but whole numbers."""
    import torch

    if isinstance(indices, torch.Tensor):
        return indices if indices.dtype == torch.int64 and indices.ndim == 1 and indices.is_cpu else None
    if type(indices) is range or (type(indices) in (list, tuple) and all(type(index) is int for index in indices)):
        return torch.tensor(list(indices), dtype=torch.int64)
    return None


def _read_memory(tensors: list[Tensor], rows: Tensor | None, count: int) -> Iterator[bytes]:
    """Digests of ``count`` rows. A chunk of whole encodings is laid out at a time; one call of sha256 reads each."""
    import torch

    headers = [_tensor_header(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
    headers[0] = DOMAIN + b"T" + _number(len(tensors)) + headers[0]
    template, columns = bytearray(), []
    for header, tensor in zip(headers, tensors, strict=True):
        width = tensor[:1].numel() * tensor.element_size()
        start = len(template) + len(header)
        template += header + bytes(width)
        if width:
            flat = tensor.detach().reshape(len(tensor), -1).view(torch.uint8)
            columns.append((flat, slice(start, start + width)))
    length = len(template)
    laid_out = torch.frombuffer(template, dtype=torch.uint8).repeat(min(count, max(1, CHUNK // length)), 1)
    raw = memoryview(laid_out.numpy().data).cast("B") if count else memoryview(b"")
    sha256 = hashlib.sha256
    for first in range(0, count, max(1, len(laid_out))):
        last = min(count, first + len(laid_out))
        for flat, column in columns:
            laid_out[: last - first, column] = (
                flat[first:last] if rows is None else flat.index_select(0, rows[first:last])
            )
        for start in range(0, (last - first) * length, length):
            yield sha256(raw[start : start + length]).digest()
