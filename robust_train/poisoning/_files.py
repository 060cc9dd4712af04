"""Files that are written whole, and JSON that is read with suspicion."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def written_whole(path: str | Path) -> Iterator[TextIO]:
    """A file to write into, which takes the place of ``path`` at the end: no reader ever sees half of it."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("x", encoding="utf-8", newline="") as file:
        try:
            yield file
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
        ValueError: it cannot be read, is larger, is no JSON (NaN and infinities are none), or has an entry twice; one
            line that names the file.
    """
    try:
        check_file(path, largest)
        text = Path(path).read_bytes()
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise ValueError(f"{path}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_file(path: str | Path, largest: int) -> None:
    """Refuse what is no regular file, or has more than so many bytes, with a ValueError."""
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    if Path(path).stat().st_size > largest:
        raise ValueError(f"the file is larger than {largest} bytes")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers must not see two contents in one file."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry of the JSON stands there twice")
    return entries
