"""The jobs of a hyper-parameter sweep side by side: what each setting costs and buys, averaged over seeds."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from robust_train.custody._files import read_json

from . import _svg as svg
from .tradeoff import pareto_front

RESULT, OVERRIDES, ERROR = "result.json", ".hydra/overrides.yaml", "error.txt"
LARGEST, SHORT = 1 << 24, 1 << 16  # bytes that are read of a result, and of other files
HUGE = 1e100  # no metric that means anything is larger
RATES = re.compile(r"clean_acc|robust_acc(_.+)?|attack_success_rate")
METRICS = re.compile(rf"{RATES.pattern}|clean_loss|robust_loss(_.+)?|epsilon|delta|filter_kept|train_seconds")
WORST = ("epsilon", "delta")  # of several seeds the largest is told: no mean of them was proved for any
NAMES = {  # in this order
    "clean_acc": "clean accuracy",
    "robust_acc": "robust accuracy",
    "robust_acc_": "under",
    "clean_loss": "clean loss",
    "robust_loss": "robust loss",
    "robust_loss_": "under",
    "epsilon": "ε",
    "delta": "δ",
    "attack_success_rate": "trigger works",
    "filter_kept": "rows kept",
    "train_seconds": "training",
}


@dataclass(frozen=True)
class Job:
    """One finished job.

    Args:
        folder: its path within the sweep's.
        overrides: what it was started with, such as ``threat.eps=4/255``.
        seed: of its random numbers; None if it had none.
        threat: what the attacker of the test may do, in words.
        attacks: name and description of those that judged.
        metrics: what was measured; an ``epsilon`` of None is void.
    """

    folder: str
    overrides: tuple[str, ...]
    seed: int | None
    threat: str
    attacks: Mapping[str, str]
    metrics: Mapping[str, float | None]

    @property
    def settings(self) -> dict[str, str]:
        """Values by key, without the seed and what is Hydra's own; as in Hydra, the last of several values counts."""
        parted = [text.partition("=") for text in self.overrides]
        return {key: value for key, _, value in parted if not (_is_seed(key) or _is_hydras(key))}


@dataclass(frozen=True)
class Failed:
    """A job without a result that could be read: where it is, why, and what it was started with, if that is known."""

    folder: str
    reason: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """What a sweep's folder holds: its name, and jobs that finished, did not finish, and finished but are broken."""

    name: str
    jobs: tuple[Job, ...]
    unfinished: tuple[Failed, ...] = ()
    unreadable: tuple[Failed, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A metric of a row: the mean over the ``n`` seeds that have it, and their sample standard deviation.

    ``spread`` is None with fewer than two. Of epsilon and delta ``value`` is the largest; an epsilon of None is void.
    """

    value: float | None
    spread: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """Jobs that differ in nothing but the seed.

    Args:
        settings: what differs from row to row, value by key.
        threat: what the attacker may do.
        attacks: name and description of those that judged.
        seeds: how many jobs there are.
        metrics: what was measured, by the name it has in ``result.json``.
        front: on the Pareto front of the rows that were judged by the same attacks within the same threat.
    """

    settings: Mapping[str, str]
    threat: str
    attacks: Mapping[str, str]
    seeds: int
    metrics: Mapping[str, Measured]
    front: bool

    @property
    def judges(self) -> str:
        """The attacks as text."""
        return ", ".join(f"{name}: {attack}" for name, attack in self.attacks.items()) or "no attack"

    @property
    def kind(self) -> str:
        """``acc``, or ``loss`` where the task has no classes."""
        return _kind(self.metrics)

    @property
    def void(self) -> bool:
        """Whether the privacy certificate of a seed was voided."""
        return "epsilon" in self.metrics and self.metrics["epsilon"].value is None


def read_sweep(folder: str | Path) -> Sweep:
    """Find all jobs beneath a folder. Links to folders are not followed.

    Args:
        folder: of the sweep; its sub-folders, however deep, with a ``result.json`` or Hydra's files are jobs.

    Returns:
        The sweep, its jobs in the order of their folders' names (2 before 10).

    Raises:
        ValueError: there is no such folder, or no job in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; give the folder of a sweep, such as multirun/2025-01-31/12-00-00")
    jobs, unfinished, unreadable = [], [], []

    def broken(place: str | Path, error: Exception) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        unreadable.append(Failed(Path(os.path.relpath(place, root)).as_posix(), svg.clean(reason)))

    for place, below, _ in os.walk(root, onerror=lambda error: broken(error.filename, error)):
        for link in (Path(place, name) for name in below):
            if link.is_symlink() and ((link / RESULT).exists() or (link / OVERRIDES).exists()):
                broken(link, ValueError("links are not followed; move the folder here"))
        here = Path(place)
        try:
            if here != root and os.path.lexists(here / RESULT):
                jobs.append(_job(here.relative_to(root).as_posix(), read_json(here / RESULT, LARGEST)))
            elif here != root and (here / OVERRIDES).is_file():
                unfinished.append(_unfinished(here, here.relative_to(root).as_posix()))
        except (OSError, ValueError) as error:
            broken(here, error)
    if not (jobs or unfinished or unreadable):
        raise ValueError(f"{root} holds no jobs: no folder in it has a {RESULT} or {OVERRIDES}")
    found = (tuple(sorted(kind, key=by_folder)) for kind in (jobs, unfinished, unreadable))
    return Sweep(root.resolve().name, *found)


def _job(folder: str, content: Any) -> Job:
    if not isinstance(content, dict):
        raise ValueError(f"{RESULT} holds no JSON object")
    types = {"recipe": str, "overrides": list, "threat": str, "attacks": dict, "results": dict}
    wrong = [key for key, kind in types.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise ValueError(f"{RESULT}: {', '.join(wrong)} missing, or not as robust-train writes it")
    overrides, attacks, seed = content["overrides"], content["attacks"], content.get("seed")
    if not all(isinstance(text, str) for text in (*overrides, *attacks.values())):
        raise ValueError(f"{RESULT}: overrides and attacks must be text")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"{RESULT}: seed must be a whole number or null")
    own = content["results"].get(content["recipe"])
    if not isinstance(own, dict):
        raise ValueError(f"{RESULT}: results has no entry for the recipe, {content['recipe']!r}")
    metrics = {name: _number(name, value) for name, value in own.items() if METRICS.fullmatch(name)}
    return Job(folder, tuple(overrides), seed, content["threat"], attacks, metrics)


def _number(name: str, value: Any) -> float | None:
    if name == "epsilon" and value is None:
        return None
    limits = (0, 1) if RATES.fullmatch(name) else (-HUGE, HUGE) if "_loss" in name else (0, HUGE)
    if isinstance(value, bool) or not isinstance(value, int | float) or not limits[0] <= value <= limits[1]:
        raise ValueError(f"{RESULT}: {name} must be a number from {limits[0]:g} to {limits[1]:g}, got {value!r:.40}")
    return float(value)


def _unfinished(path: Path, folder: str) -> Failed:
    said, started = b"", b""
    if (path / ERROR).is_file():
        with (path / ERROR).open("rb") as file:
            said = file.read(SHORT)
    with (path / OVERRIDES).open("rb") as file:
        started = file.read(SHORT)
    lines = said.decode("utf-8", errors="replace").strip().splitlines()
    try:
        overrides = yaml.safe_load(started)
    except (yaml.YAMLError, ValueError, RecursionError):
        overrides = ["(its overrides cannot be read)"]
    texts = [text for text in overrides if isinstance(text, str)] if isinstance(overrides, list) else []
    return Failed(folder, svg.clean(lines[0])[:500] if lines else "it was stopped, or is still running", tuple(texts))


# --- rows -----------------------------------------------------------------------------------------------------------


def table(sweep: Sweep) -> list[Row]:
    """Average over seeds, and find the Pareto front.

    Rows on the front are dominated by no other in clean accuracy (or loss), worst-case robust accuracy (or loss) and
    epsilon; a row that is not private has an infinite one. Rows are compared only where attacks and threat are the
    same. A row with a void epsilon, or without one of the accuracies, is never on the front, and dominates none. Of
    jobs with the same overrides and the same seed, the one in the last folder counts.

    Args:
        sweep: its jobs, in any order.

    Returns:
        Rows in the order of threats and settings.
    """
    swept = swept_keys(sweep)
    rows = []
    for jobs in alike(sweep):
        names = sorted({name for job in jobs for name in job.metrics}, key=metric_order)
        rows.append(
            Row(
                settings={key: jobs[0].settings[key] for key in swept if key in jobs[0].settings},
                threat=jobs[0].threat,
                attacks=dict(sorted(jobs[0].attacks.items())),
                seeds=len(jobs),
                metrics={n: _measured(n, [job.metrics[n] for job in jobs if n in job.metrics]) for n in names},
                front=False,
            )
        )
    rows.sort(key=lambda row: (_natural(row.threat), [_magnitude(row.settings.get(k)) for k in swept], row.judges))
    for group in comparable(rows):
        valid = [i for i in group if not rows[i].void]
        for i, front in zip(valid, pareto_front([merits(rows[i]) for i in valid]), strict=True):
            rows[i] = replace(rows[i], front=front)
    return rows


def swept_keys(sweep: Sweep) -> list[str]:
    """The settings that are not the same in all jobs: choices of groups first, then by name."""
    every = [job.settings for job in sweep.jobs]
    keys = {key for settings in every for key in settings}
    return sorted((k for k in keys if len({s.get(k) for s in every}) > 1), key=lambda k: ("." in k, k))


def shared_overrides(sweep: Sweep) -> list[str]:
    """The overrides that are the same in all jobs, and all of Hydra's own."""
    swept = set(swept_keys(sweep))
    keys = [(text, text.partition("=")[0]) for job in sweep.jobs for text in job.overrides]
    return sorted({text for text, key in keys if _is_hydras(key) or not (key in swept or _is_seed(key))})


def by_folder(job: Job | Failed) -> Any:
    return _natural(job.folder)


def alike(sweep: Sweep) -> list[list[Job]]:
    """Jobs that differ in nothing but the seed, one for each seed."""
    groups: dict[Any, dict[Any, Job]] = defaultdict(dict)
    for job in sorted(sweep.jobs, key=by_folder):
        key = frozenset(job.settings.items()), job.threat, frozenset(job.attacks.items()), _kind(job.metrics)
        groups[key][job.folder if job.seed is None else job.seed] = job
    return [list(group.values()) for group in groups.values()]


def _measured(name: str, values: Sequence[float | None]) -> Measured:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return Measured(None, None, len(values))
    if name in WORST:
        return Measured(max(numbers), None, len(numbers))
    return Measured(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def merits(row: Row) -> list[float]:
    """Clean, robust, privacy: more is better. Empty where one of the first two was not measured."""
    both = [row.metrics[name].value for name in (f"clean_{row.kind}", f"robust_{row.kind}") if name in row.metrics]
    values = [value for value in both if value is not None]
    if len(values) < 2:
        return []
    epsilon, sign = math.inf, 1.0 if row.kind == "acc" else -1.0
    if (private := row.metrics.get("epsilon")) and private.n == row.seeds and private.value is not None:
        epsilon = private.value  # a row of which a seed is not private is not private
    return [*(sign * value for value in values), -epsilon]


def comparable(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of the rows that were measured alike, without those that lack a measurement."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        if merits(row):
            groups[row.threat, row.judges, row.kind].append(i)
    return list(groups.values())


def _kind(metrics: Iterable[str]) -> str:
    return "acc" if {"clean_acc", "robust_acc"} & set(metrics) else "loss"


def _is_seed(key: str) -> bool:
    return key.lstrip("+") == "seed"


def _is_hydras(key: str) -> bool:
    return key.lstrip("+~").startswith(("hydra.", "hydra/"))


def _natural(text: str) -> tuple[Any, ...]:
    """Sorts 2 before 10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d{1,9})", text)
    ], text


def _magnitude(value: str | None) -> tuple[Any, ...]:
    """Sorts numbers and fractions by size, before other text."""
    if value is None:
        return (2,)
    try:
        top, _, bottom = value.partition("/")
        size = float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        size = math.nan
    return (0, size, value) if math.isfinite(size) else (1, _natural(value))


def metric_order(name: str) -> tuple[int, str]:
    return list(NAMES).index(family(name)), name


def family(name: str) -> str:
    return re.sub(r"^(robust_(?:acc|loss)_).+", r"\1", name)
