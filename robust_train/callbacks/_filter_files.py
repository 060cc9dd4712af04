"""What a filtered run leaves in its folder: mask, decisions, report, quarantine, pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Subset

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, get
from robust_train.callbacks._callback import plain
from robust_train.callbacks._loaders import copied, rebuilt
from robust_train.custody.digest import digests
from robust_train.custody.merkle import merkle_root
from robust_train.evasion.randomness import preserved_rng
from robust_train.poisoning._files import read_json, written_whole
from robust_train.poisoning.policy import ACTIONS
from robust_train.poisoning.quarantine import FILE as QUARANTINE_FILE
from robust_train.poisoning.quarantine import Quarantine
from robust_train.poisoning.records import (
    DECISIONS_FILE,
    PICTURES_FILE,
    REPORT_FILE,
    Decisions,
    summary,
    write_decisions,
    write_report,
)
from robust_train.report.filtering import page_from_folder

if TYPE_CHECKING:
    from robust_train.callbacks._filtering import Judged

PAGE_FILE = "filter_report.html"
PICTURES = 40
LARGEST = 1 << 28  # bytes of a mask file
UNDECIDED = ("too few canaries", "too weak")  # how notes of verdicts that decided nothing begin


@dataclass(frozen=True, eq=False)
class Mask:
    """Which rows of which data are trained on.

    Attributes:
        keep: bool ``(N,)``.
        root: tells the data from others, 64 hex digits.
        action: the policy's.
        weights: how often each row is drawn, ``(N,)``; None: all alike.
    """

    FILE: ClassVar[str] = "filter_mask.json"

    keep: np.ndarray
    root: str
    action: str
    weights: np.ndarray | None = None

    def check(self, size: int, root: str) -> None:
        """Refuse the mask for other data.

        Raises:
            ValueError: the rows are others.
        """
        if len(self.keep) != size or self.root != root:
            raise ValueError(
                f"DataFilter: the mask was made for {len(self.keep)} rows with root {self.root[:16]}…, and the train "
                f"data now are {size} rows with root {root[:16]}…. Use the same data (train_dataloader() must give the "
                "same rows in every call), or decide anew: with a new DataFilter, without this mask or checkpoint"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins."""
        down = None if self.weights is None else sorted({float(w) for w in self.weights})
        light = None if self.weights is None else self.weights == self.weights.min()
        return {
            "version": 1,
            "root": self.root,
            "rows": len(self.keep),
            "action": self.action,
            "keep": packed(self.keep),
            "light": None if light is None or down is None or len(down) < 2 else packed(light),
            "weight": None if down is None else down[0],
        }

    @classmethod
    def from_dict(cls, state: Any) -> Mask:
        """A mask from what a file or checkpoint holds.

        Raises:
            ValueError: it is no mask.
        """
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']!r:.20} is not known")
            rows = state["rows"]
            if type(rows) is not int or rows < 1 or not isinstance(state["root"], str):
                raise ValueError("rows or root is of another kind")
            if state["action"] not in ACTIONS:
                raise ValueError(f"action {state['action']!r:.20} is not known")
            keep, weights = unpacked(state["keep"], rows), None
            if state["weight"] is not None:
                if not 0 < float(state["weight"]) <= 1:
                    raise ValueError(f"weight {state['weight']!r:.20} is not in (0, 1]")
                weights = np.ones(rows)
                if state["light"] is not None:
                    weights[unpacked(state["light"], rows)] = float(state["weight"])
            return cls(keep, state["root"], state["action"], weights)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no mask of DataFilter: {error}") from error

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        with written_whole(path) as file:
            file.write(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Mask:
        """A mask from its file, or from the folder of the run that wrote it.

        Raises:
            ValueError: the file cannot be read, or is no mask.
        """
        path = Path(path) / cls.FILE if Path(path).is_dir() else Path(path)
        try:
            return cls.from_dict(read_json(path, LARGEST))
        except ValueError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ValueError(f"data_filter.mask: {path}: {reason}") from None


def packed(bits: np.ndarray) -> str:
    """Truth values as text, eight to a byte."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The truth values again, bool ``(count,)``."""
    content = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(content) != -(-count // 8):
        raise ValueError(f"{len(content)} bytes do not hold {count} truth values")
    return np.unpackbits(content, count=count).astype(bool)


def write_outputs(
    folder: Path,
    judged: Judged,
    mask: Mask,
    digests: list[str] | None,
    root: str,
    settings: dict[str, Any],
    loader: Any,
    inputs: str | int | None,
    simulation: dict[str, Any] | None,
    earlier: Quarantine | None,
) -> None:
    """All files of a filtered run.

    Args:
        folder: the run's.
        judged: what was found.
        mask: what is trained on.
        digests: of the rows, in hex, or None.
        root: of the data.
        settings: of the callback.
        loader: the user's, for pictures of the most suspicious rows.
        inputs: where they are in a batch.
        simulation: what is known of a simulated poison; comes first in the report.
        earlier: the quarantine whose restored rows were kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    touched = judged.outcome.touched
    out = "drop" if mask.action == "downweight" else mask.action  # only the predicate's rows are left out then
    weights = mask.keep * (1.0 if mask.weights is None else mask.weights)
    decision = np.where(touched, np.where(mask.keep, "downweight", out), "keep")
    decisions = Decisions(judged.labels, digests, tuple(judged.columns), decision, weights)
    images, rows = pictures(judged, loader, inputs)
    report = {
        **({} if simulation is None else {"simulation": simulation}),
        "outcome": outcome_text(judged, mask),
        **summary(decisions, judged.classes),
        "capped": int(judged.outcome.capped.sum()),
        "notes": judged.outcome.notes,
        "data": {"root": root, "rows": len(mask.keep), "digests": digests is not None},
        "probe": judged.probe,
        "settings": settings,
        "versions": {name: version(name) for name in ("robust-train", "torch", "pytorch-lightning", "numpy")},
    }
    if images is not None:
        np.save(folder / PICTURES_FILE, images, allow_pickle=False)
        report["pictures"] = {"file": PICTURES_FILE, "rows": rows}
    else:  # of an earlier run in the same folder
        (folder / PICTURES_FILE).unlink(missing_ok=True)
    mask.write(folder / Mask.FILE)
    write_decisions(folder / DECISIONS_FILE, decisions)
    write_report(folder / REPORT_FILE, plain(report))
    (folder / PAGE_FILE).write_text(page_from_folder(folder), encoding="utf-8")
    if mask.action != "downweight":
        Quarantine.of(decisions, classes=judged.classes, root=root, before=earlier).write(folder / QUARANTINE_FILE)


def outcome_text(judged: Judged, mask: Mask) -> str:
    """What was done, in a sentence."""
    touched = int(judged.outcome.touched.sum())
    verb = {"quarantine": "quarantined", "drop": "dropped", "downweight": "drawn less often"}[mask.action]
    share = 100 * touched / len(mask.keep)
    weak = [c.name for c in judged.columns if str(c.calibration.get("note", "")).startswith("too weak")]
    ranks = [c.name for c in judged.columns if c.calibration.get("method") == "none"]
    text = f"{touched} of {len(mask.keep)} rows ({share:.2f} %) are {verb}."
    text += f" Too weak to tell: {', '.join(weak)}." if weak else ""
    return text + (f" Ranked, and nothing decided: {', '.join(ranks)}." if ranks else "")


def say_what_was_found(judged: Judged) -> None:
    """On the console: filters that decided nothing, and groups that a person should look at."""
    ranking = [c.name for c in judged.columns if c.calibration.get("method") == "none"]
    if ranking and len(ranking) == len(judged.columns):
        rank_zero_warn(
            f"DataFilter: {', '.join(ranking)} only ranks rows: no threshold could be calibrated, and nothing is "
            "decided. The ranks are in filter_decisions.csv. To decide, add AUM or IsolatedGroups, or trusted rows"
        )
    notes: dict[str, list[str]] = {}
    for column in judged.columns:
        note = str(column.calibration.get("note", ""))
        if note.startswith(UNDECIDED):
            notes.setdefault(note, []).append(column.name)
        if bad := [group for group in column.calibration.get("groups", ()) if group["flagged"]]:
            count = sum(group["rows"] for group in bad)
            rank_zero_info(
                f"DataFilter: {column.name} found {len(bad)} groups ({count} rows) apart from their class "
                "that a model trained without them takes for another one. Poison does, and so may a kind of its "
                "own within a class: look at filter_report.html, restore what is harmless, or give trusted rows."
            )
    for note, names in notes.items():
        rank_zero_info(f"DataFilter: {', '.join(names)}: {note}.")


def pictures(judged: Judged, loader: Any, inputs: str | int | None) -> tuple[np.ndarray | None, list[int]]:
    """The most suspicious rows as uint8 images ``(M, C, H, W)``, the flagged ones first; None where they are none."""
    rank = np.zeros(len(judged.labels))
    for column in judged.columns:
        order = np.argsort(column.scores, kind="stable")
        ranks = np.empty(len(order))
        ranks[order] = np.arange(len(order)) / max(len(order), 1)
        rank += column.flagged * (1 + ranks)
    rows = [int(i) for i in np.argsort(-rank, kind="stable")[:PICTURES] if rank[i] > 0]
    if not rows:
        return None, []
    found = []
    try:
        batches = list(copied(rebuilt(loader, Subset(loader.dataset, rows), shuffle=False), persistent_workers=False))
    except Exception:  # what a predicate refuses may be of no use to the user's collate function
        return None, []
    for batch in batches:
        x = get(batch, find_input(batch, inputs))
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            return None, []
        found.append(x.float().nan_to_num())
    if len({x.shape[1:] for x in found}) > 1 or sum(map(len, found)) != len(rows):
        return None, []
    x = torch.cat(found)
    low, high = x.amin(), x.amax()
    return ((x - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8).numpy(), rows


def identity(dataset: Any) -> tuple[list[str] | None, str]:
    """SHA-256 of every row in hex, and what tells the whole dataset from another: the Merkle root of the rows.

    A dataset that augments its rows at random has other rows each time, and one that yields objects of its own has no
    digests: there are none then, and it is told by its type and length.
    """
    with preserved_rng(torch.device("cpu")), _seams.generators_kept(dataset):
        torch.manual_seed(0)  # so that rows which are augmented now and then are the same in every run
        random.seed(0)
        np.random.seed(0)
        try:
            found = digests(dataset)
        except (TypeError, ValueError):
            name = f"{type(dataset).__module__}.{type(dataset).__qualname__}/{len(dataset)}"
            return None, hashlib.sha256(name.encode()).hexdigest()
    return [d.hex() for d in found], merkle_root(found).hex()


def simulation(trainer: Any, judged: Judged) -> dict[str, Any] | None:
    """What is known of a simulated poison, where the run simulates one: it comes first in the report."""
    for callback in trainer.callbacks:
        if type(callback).__name__ == "PoisonSimulation":
            return callback.report(judged.outcome.touched)
    return None
