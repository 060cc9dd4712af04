"""JSON files that are written whole and read with suspicion."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: no reader ever sees half of it.

    Args:
        path: of the file; what was there is replaced.
        text: its content.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.close()
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def read_json(path: str | Path, largest: int) -> Any:
    """Content of a JSON file that may come from anyone.

    Args:
        path: of the file.
        largest: how many bytes it may have.

    Raises:
        ValueError: it cannot be read, is no regular file, is larger, is no JSON (NaN and infinities are none), or has
            an entry twice.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("there is no such file")
        with Path(path).open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise ValueError(f"the file is larger than {largest} bytes")
        return json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers must not see two contents in one file."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry of the JSON stands there twice")
    return entries
