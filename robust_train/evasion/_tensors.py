"""Tensors in files: the safetensors format, written whole and read with suspicion.

The format is a header of JSON, which says of each tensor its type, its shape and where its bytes lie, and then the
bytes: nothing in it can run. Files are readable by the ``safetensors`` package, which is not needed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
LARGEST_HEADER = 16 * 2**20


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors and some texts into one file, whole or not at all.

    Args:
        path: of the file; what was there is replaced.
        tensors: by name.
        about: texts by name.

    Raises:
        ValueError: a tensor's type is none of the format's.
    """
    header: dict[str, object] = {"__metadata__": dict(about)}
    parts, begin = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name}: tensors of type {tensor.dtype} cannot be written")
        data = as_bytes(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + len(data)],
        }
        parts.append(data)
        begin += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def read_tensors(path: str | Path, largest: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``write_tensors`` wrote.

    Args:
        path: of the file.
        largest: how many bytes it may have.

    Raises:
        ValueError: it cannot be read, is larger, or is no safetensors file; one line that names the file.
    """
    path = Path(path)
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"the file is larger than {largest} bytes")
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if not 0 < length <= min(len(content) - 8, LARGEST_HEADER):
            raise ValueError("it is no safetensors file")
        header = json.loads(content[8 : 8 + length])
        about = header.pop("__metadata__", {})
        body = bytearray(content[8 + length :])
        return {name: _tensor(entry, body) for name, entry in header.items()}, {k: str(v) for k, v in about.items()}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path}: {error or 'it is no safetensors file'}") from None


def as_bytes(tensor: Tensor) -> bytes:
    """The tensor's numbers as they lie in memory, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: no reader ever sees half of it."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("xb") as file:
        try:
            file.write(content)
            file.close()
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def _tensor(entry: dict[str, object], body: bytearray) -> Tensor:
    begin, end = entry["data_offsets"]  # type: ignore[misc]
    dtype, shape = TYPES[str(entry["dtype"])], [int(size) for size in entry["shape"]]  # type: ignore[attr-defined]
    if not 0 <= begin <= end <= len(body) or min(shape, default=0) < 0:  # type: ignore[operator]
        raise ValueError("a tensor lies outside of the file")
    if end == begin:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body[begin:end], dtype=dtype).reshape(shape)
