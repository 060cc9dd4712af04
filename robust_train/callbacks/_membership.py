"""The work of a membership audit: who is compared with whom, and what comes out."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from robust_train.callbacks._callback import call_text
from robust_train.callbacks._layout import Places
from robust_train.callbacks._loaders import original_rows
from robust_train.callbacks._losses import LossReader, Way
from robust_train.callbacks._references import Training, copy_for_audit, references
from robust_train.privacy.attacks.base import MembershipAttack
from robust_train.privacy.membership import Leakage, Signals, halves, measure
from robust_train.privacy.output.base import OutputPerturbation

if TYPE_CHECKING:
    import pytorch_lightning as pl

SCHEMA, VERSION = "robust-train/membership-audit", 1
AUDIT_FILE, EXPOSED_FILE = "audit.json", "most_exposed.csv"
ASSUMPTIONS = (
    "The unit is one record: whoever contributed several is more exposed.",
    "An attack that finds nothing proves nothing: these figures bound the leakage from below.",
    "Members and non-members come from one distribution and are read through the same transforms.",
    "The attacker knows how the model was trained, and has data of the same distribution to train references on.",
    "Intervals are for these records, and take the models as given.",
)
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pool:
    """Who is audited.

    Attributes:
        members: rows that the model was trained on, map-style.
        others: rows that it was not.
        audited: numbers in ``members + others`` of the rows whose losses are read, ascending.
    """

    members: Any
    others: Any
    audited: np.ndarray

    @staticmethod
    def of(members: Any, others: Any, most: int | None, seed: int) -> Pool:
        """A pool with at most ``most`` audited rows of each kind, chosen by chance.

        Raises:
            ValueError: there is no row of one kind.
        """
        m, n = len(members), len(others)
        if not m or not n:
            raise ValueError(f"MembershipAudit needs members and non-members, got {m} and {n}")
        draw = np.random.default_rng(seed)
        parts = [draw.permutation(size)[:most] + begin for size, begin in ((m, 0), (n, m))]
        return Pool(members, others, np.sort(np.concatenate(parts)))

    @property
    def everything(self) -> Any:
        return ConcatDataset([self.members, self.others])

    @property
    def is_member(self) -> np.ndarray:
        """Of the audited rows, bool ``(N,)``."""
        return self.audited < len(self.members)


@dataclass
class Audit:
    """What was found.

    Attributes:
        way: how losses were read.
        leakage: by attack.
        scores: by attack, of the audited rows.
        losses: of the audited rows under the model.
        perturbed: by output perturbation, then by attack.
        cached: how many references came from the cache.
        seconds: what it took.
    """

    way: Way
    leakage: dict[str, Leakage]
    scores: Scores
    losses: np.ndarray
    perturbed: dict[str, dict[str, Leakage]] = field(default_factory=dict)
    cached: int = 0
    seconds: float = 0.0

    @property
    def worst(self) -> str:
        """The attack with the largest area."""
        return max(self.leakage, key=lambda name: self.leakage[name].auc)


def audit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    pool: Pool,
    *,
    count: int,
    training: Training,
    attacks: Mapping[str, MembershipAttack],
    outputs: Mapping[str, OutputPerturbation],
    places: Places,
    cache: Path | None,
) -> Audit:
    """Read the module's losses and those of reference models, and attack with them.

    Args:
        trainer: the run's.
        module: the trained module, which is not touched.
        pool: who is audited.
        count: reference models.
        training: how they are trained.
        attacks: by name.
        outputs: perturbations of the model's answers under which to measure again, by name.
        places: what the user said of where inputs, labels and logits are.
        cache: folder of references that were trained before, or None.

    Raises:
        ValueError: losses cannot be read, or the task has no outputs that could be perturbed.
    """
    began = time.monotonic()
    everything, rows = pool.everything, Subset(pool.everything, pool.audited.tolist())
    collate = training.loader.collate_fn

    def read(model: Any, way: Way) -> dict[str, np.ndarray]:
        """Losses by output perturbation, ``""`` for none."""
        reader = LossReader(trainer, model, collate, places)
        found = {"": reader.losses(rows, way)}
        if outputs:
            answers, labels = reader.log_probabilities(rows, way)
            for name, output in outputs.items():
                shown = output(answers.exp())[torch.arange(len(labels)), labels]
                found[name] = -shown.double().clamp_min(torch.finfo(torch.float64).tiny).log().numpy()
        return found

    target = copy_for_audit(trainer, module)
    way = LossReader(trainer, target, collate, places).find_way(rows)
    own = read(target, way)
    del target
    trained_on = halves(len(everything), count, training.seed) if count else np.zeros((0, len(everything)), dtype=bool)
    theirs: dict[str, list[np.ndarray]] = {name: [] for name in own}
    cached = 0
    for model, known in references(trainer, module, everything, trained_on, training, cache):
        cached += known
        for name, losses in read(model, way).items():
            theirs[name].append(losses)
    found: dict[str, tuple[dict[str, Leakage], Scores]] = {}
    for name, losses in own.items():
        signals = Signals(losses, np.reshape(theirs[name], (count, len(losses))), trained_on[:, pool.audited])
        scores = {key: attack(signals) for key, attack in attacks.items()}
        found[name] = {key: measure(score, pool.is_member) for key, score in scores.items()}, scores
    leakage, scores = found.pop("")
    perturbed = {name: measured for name, (measured, _) in found.items()}
    return Audit(way, leakage, scores, own[""], perturbed, cached, time.monotonic() - began)


def as_json(found: Audit, pool: Pool, attacks: Mapping[str, Any], outputs: Mapping[str, Any], **run: Any) -> Any:
    """What ``audit.json`` holds: no record, and nothing that could be traced to one."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "unit": "record",
        "members": int(pool.is_member.sum()),
        "others": int((~pool.is_member).sum()),
        "worst": found.worst,
        "attacks": {name: _entry(attacks[name], leakage) for name, leakage in found.leakage.items()},
        "outputs": {
            name: {"settings": call_text(outputs[name]), **{key: value.to_dict() for key, value in leakage.items()}}
            for name, leakage in found.perturbed.items()
        },
        "losses_read_through": str(found.way),
        "loss_of_a_batch_is_of_its_examples": found.way.additive,
        "intervals": "95 %: AUC by DeLong, rates by Clopper-Pearson for the threshold as chosen",
        "references_from_cache": found.cached,
        "seconds": round(found.seconds, 1),
        "assumptions": list(ASSUMPTIONS),
        "versions": _versions(),
        **run,
    }


def as_table(found: Audit, pool: Pool) -> str:
    """For the terminal: no record, only how well all of them can be told apart."""
    rows = [("attack", "AUC (95 %)", "TPR at 1 % FPR", "TPR at 0.1 % FPR")]
    for suffix, leakage in (("", found.leakage), *((f", {name}", part) for name, part in found.perturbed.items())):
        rows += [(name + suffix, *_cells(measured)) for name, measured in leakage.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = (
        f"Membership inference: {int(pool.is_member.sum())} members, {int((~pool.is_member).sum())} non-members; "
        "0.5 is guessing"
    )
    return "\n".join([head, *lines])


def write_exposed(path: Path, found: Audit, pool: Pool, most: int) -> None:
    """The members that the worst attack is surest of, in a file that only its owner may read.

    Args:
        path: of the file, which is made anew.
        found: by the audit.
        pool: who was audited.
        most: lines.
    """
    scores = np.where(pool.is_member, found.scores[found.worst], np.nan)
    order = np.argsort(-scores, kind="stable")[: min(most, int((~np.isnan(scores)).sum()))]  # NaN comes last
    numbers = original_rows(pool.members, pool.audited[order])
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("row", "score", "loss"))
    out.writerows((int(n), f"{scores[i]:.6g}", f"{found.losses[i]:.6g}") for n, i in zip(numbers, order, strict=True))
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # never readable, not even for a moment
    try:
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(text.getvalue())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _entry(attack: Any, leakage: Leakage) -> dict[str, Any]:
    return {"settings": call_text(attack), **leakage.to_dict()}


def _cells(leakage: Leakage) -> tuple[str, str, str]:
    def rate(fpr: float) -> str:
        found = leakage.tpr[fpr]
        return "n/a" if found is None else f"{found.value:.2%} ({found.low:.2%}-{found.high:.2%})"

    return f"{leakage.auc:.3f} ({leakage.low:.3f}-{leakage.high:.3f})", rate(0.01), rate(0.001)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("robust-train", "torch", "pytorch-lightning", "scipy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
