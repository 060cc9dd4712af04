"""A file that counts noisy steps before they are taken, so that a crash forgets none."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

Segment = tuple[float, float, int]


class Journal:
    """One line for each noisy step: ``[noise multiplier, sample rate, 1]``, written before the step is taken.

    The gradients of steps after the last checkpoint are lost in a crash, but whoever watched the run has seen them:
    they count. The journal outlives the process; a run that resumes goes on with the same file.

    Args:
        path: of the file.
        key: names the run; what a checkpoint stores, and what the file's first line must say.

    Guarantees:
        Once ``record`` returns, the step is counted by ``read`` even if the process is killed (``SIGKILL``) at once.
        A power failure may lose the last seconds. A line that a kill cut short counts as nothing: its step was never
        taken.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        # unbuffered: a line has left the process when record returns
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    @classmethod
    def begin(cls, folder: Path, history: Iterable[Segment] = (), key: str | None = None) -> Journal:
        """A new file in ``folder`` whose first lines are what was spent before."""
        key = secrets.token_hex(8) if key is None else key
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name_of(key)
        lines = [json.dumps({"journal": key, "format": 1}), *(json.dumps(list(segment)) for segment in history)]
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        return cls(path, key)

    @classmethod
    def resume(cls, path: Path, key: str) -> Journal:
        """Go on with a file; a line that a kill cut short is taken off."""
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with path.open("rb+") as file:
                file.truncate(content.rfind(b"\n") + 1)
        return cls(path, key)

    def record(self, noise_multiplier: float, sample_rate: float) -> None:
        """One step is about to be taken."""
        line = (json.dumps([noise_multiplier, sample_rate, 1]) + "\n").encode()
        if os.write(self._file, line) < len(line):
            raise OSError(f"{self.path}: the privacy journal cannot be written (disk full?); the step was not taken")

    def close(self) -> None:
        os.close(self._file)


def name_of(key: str) -> str:
    """What the file of a run is called; a key comes from a checkpoint, and may not lead out of the folder."""
    if not key.isalnum():
        raise ValueError(f"{key!r} is not the key of a privacy journal")
    return f"privacy_journal_{key}.jsonl"


def find(key: str, folders: Sequence[Path]) -> Path | None:
    """The file of a run, in the first of the folders that has it."""
    for folder in folders:
        path = folder / name_of(key)
        if path.is_file():
            return path
    return None


def read(path: Path, key: str) -> list[Segment]:
    """The history that a file counts.

    Raises:
        ValueError: it is not the journal of that run, or a line of it cannot be read.
    """
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    first, *lines = complete.splitlines() or [""]
    try:
        if json.loads(first) != {"journal": key, "format": 1}:
            raise ValueError(first)
        segments = [(float(sigma), float(rate), int(steps)) for sigma, rate, steps in map(json.loads, lines)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable privacy journal of run {key} ({error}): restore it from a copy; without it the "
            "steps since the last checkpoint cannot be counted"
        ) from error
    return merged(segments)


def merged(history: Iterable[Segment]) -> list[Segment]:
    """The same history with neighbouring segments of equal settings as one."""
    out: list[Segment] = []
    for sigma, rate, steps in history:
        if out and out[-1][:2] == (sigma, rate):
            out[-1] = (sigma, rate, out[-1][2] + steps)
        elif steps:
            out.append((sigma, rate, steps))
    return out
