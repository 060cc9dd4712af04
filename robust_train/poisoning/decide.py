"""From scores to decisions: thresholds that are calibrated in the run itself, and caps on what may be taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robust_train.poisoning.policy import Policy

CANARIES = "label canaries"
LEAST_CANARIES = 10
STEPS = 99  # thresholds that are tried: quantiles of the canaries' scores
SLACK = 0.5, 1.0, 15.0  # standard errors that are added to the share of noise: least, most, and over sqrt(canaries)
MOST_POWER = 0.97  # the last few canaries are not chased: they look clean
ALL_OF_IT = 0.05  # share of a bad group that may bear its label by chance; beyond it only rows that contradict it count
MOST_NOISE = 0.5  # share of noise beyond which nobody can say which labels are the wrong ones
OBSERVABLE = 0.3  # share of a kind of wrong label that must be found for its frequency to be read off what was found
PRIOR = 0.05  # rows of each kind of wrong label, as a share of what there is, that count as typical of all kinds
TAIL = 0.3  # share of the canaries that must lie above a threshold for the share of noise to be read there
RECOGNISED = 0.5  # share of the canaries that a model must recognise for its word on groups to count
WINDOW = 0.1, 30  # of the canaries, or how many of them: within it wrong rows are compared with all
CREDITED = 0.5  # power from which on noise is subtracted: nearer to where it is read, it excuses any weak filter


@dataclass(frozen=True)
class Verdict:
    """Which rows one filter flags, and how its threshold came about.

    Attributes:
        flagged: bool ``(N,)``.
        threshold: scores above it are flagged; None where no single number says it, or where nothing was decided.
        calibration: plain builtins for the report: ``method``, ``expected_fpr``, ``power``, ``note`` and more.
    """

    flagged: np.ndarray
    threshold: float | None
    calibration: dict[str, Any]


def share_of_noise(scores: np.ndarray, canaries: np.ndarray) -> float:
    """The share of rows that can be as suspicious as the canaries.

    If a share ``r`` of the rows is drawn from the canaries' distribution, at least ``r`` times the canaries' tail lies
    above every threshold. The estimate is the smallest ratio of the two tails, with some standard errors in each.

    Args:
        scores: of ordinary rows, ``(N,)``.
        canaries: scores of rows that are known to be bad, ``(K,)``.

    Reference:
        Blanchard, Lee and Scott, "Semi-Supervised Novelty Detection", 2010, section 5 (mixture proportion).
    """
    bound, n, k = 1.0, len(scores), len(canaries)
    slack = float(np.clip(SLACK[2] / np.sqrt(k), *SLACK[:2]))  # the smallest of many ratios is too small if k is
    for threshold in np.quantile(canaries, np.linspace(0.01, 1 - TAIL, STEPS)):
        known, seen = (canaries > threshold).mean(), (scores > threshold).mean()
        known = known - slack * np.sqrt(known * (1 - known) / k)
        if known > 0:
            bound = min(bound, (seen + slack * np.sqrt(seen * (1 - seen) / n)) / known)
    return float(bound)


def by_canaries(
    scores: np.ndarray,
    canary: np.ndarray,
    *,
    target_fpr: float,
    min_power: float,
    canary_scores: np.ndarray | None = None,
    null: np.ndarray | None = None,
) -> Verdict:
    """Flag what is as suspicious as rows whose label is known to be wrong.

    Of all thresholds at which the expected false-positive rate is at most ``target_fpr``, and of the rows next above
    at least half are expected to be wrong, the one that finds most canaries. The rate is what lies above the threshold
    beyond the estimated share of noise (``share_of_noise``), or the share of trusted rows above it, whichever is
    larger.

    Args:
        scores: ``(N,)``; higher is more suspicious.
        canary: bool ``(N,)``: rows that were given a wrong label for the time of the probe.
        target_fpr: highest expected share of clean rows that are flagged.
        min_power: least share of the canaries that must be found, beyond the share that is found of all rows; below it
            nothing is flagged.
        canary_scores: of the canaries under their wrong labels, ``(K,)`` or several times as many, where ``scores``
            judges their own labels. None: ``scores`` itself is under the wrong labels; canaries are then not judged.
        null: scores of trusted rows, ``(T,)``, or None.

    Guarantees:
        With fewer than ten canaries, or where no threshold finds ``min_power`` of them, no row is flagged; nor where
        canaries score like any other row.
    """
    known = scores[canary] if canary_scores is None else canary_scores
    ordinary = scores[~canary]
    nothing = np.zeros(len(scores), dtype=bool)
    evidence: dict[str, Any] = {"method": CANARIES, "canaries": int(canary.sum()), "target_fpr": target_fpr}
    if canary.sum() < LEAST_CANARIES or not len(ordinary):
        return Verdict(nothing, None, {**evidence, "note": "too few canaries to calibrate with: nothing is decided"})
    share = share_of_noise(ordinary, known)
    possible: list[tuple[float, float, float]] = []  # power, false-positive rate and threshold
    strongest = 0.0
    thresholds = np.quantile(known, np.linspace(0.01, 0.99, STEPS))
    powers = np.array([(known > threshold).mean() for threshold in thresholds])
    tails = np.array([(ordinary > threshold).mean() for threshold in thresholds])
    wide = int(np.ceil((STEPS + 1) * max(WINDOW[0], WINDOW[1] / len(known))))
    for i, threshold in enumerate(thresholds):
        power, above = float(powers[i]), float(tails[i])
        noise = share if power >= CREDITED or null is not None else 0.0
        fpr = max(0.0, above - noise * power) / max(1 - noise, 1e-9)
        if null is not None:
            fpr = max(fpr, float((null > threshold).mean()) - 1 / np.sqrt(len(null)) * target_fpr)
        if fpr > target_fpr or power > MOST_POWER:
            continue
        strongest = max(strongest, power - above)
        beyond = i + wide  # of the rows up to there, at least half must be as wrong as the canaries are
        wrong, rows = (power - powers[beyond], above - tails[beyond]) if beyond < STEPS else (power, above)
        if power - above >= min_power and share * wrong >= rows / 2:
            possible.append((power, fpr, float(threshold)))
    evidence |= {
        "noise_at_most": share,
        "power": strongest,
        "canary_scores": [round(float(v), 4) for v in np.quantile(known, np.linspace(0, 1, min(len(known), 200)))],
    }
    if share > MOST_NOISE:
        note = f"too weak to tell, or more than {MOST_NOISE:.0%} of the labels are wrong: nothing is decided"
        return Verdict(nothing, None, {**evidence, "note": note})
    if not possible:
        note = (
            "too weak to tell clean rows from canaries: nothing is decided"
            if strongest < min_power
            else "above no threshold are rows more likely wrong than right: nothing is decided"
        )
        return Verdict(nothing, None, {**evidence, "note": note})
    power, fpr, threshold = max(possible, key=lambda found: found[0])
    flagged = scores > threshold
    if canary_scores is None:
        flagged &= ~canary
    return Verdict(flagged, threshold, {**evidence, "expected_fpr": fpr, "power": power})


def labels_like(
    seen: np.ndarray,
    given: np.ndarray,
    taken_for: np.ndarray,
    found: np.ndarray,
    labels: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> np.ndarray:
    """Wrong labels for canaries, drawn as suspects bear them: of a cat mostly "dog", if cats were mostly labelled so.

    Suspects are those that were found, and a cat that is labelled "dog" is found less often than one that is labelled
    "lorry": each counts for as many as there must be for one to be found. Kinds of which hardly any is found are taken
    to be as frequent as is typical of the others.

    Args:
        seen: what a model takes the suspects for, int ``(S,)``.
        given: the labels that they bear, int ``(S,)``.
        taken_for: what it takes the canaries for, int ``(K,)``.
        found: whether a canary would be a suspect, by the label that it bore, bool ``(K, classes)``.
        labels: the canaries' own, int ``(K,)``; two classes at least.
        draws: labels a canary.
        seed: of what is drawn.

    Returns:
        int64 ``(draws, K)``, nowhere a row's own label.

    Reference:
        Horvitz and Thompson, "A Generalization of Sampling Without Replacement from a Finite Universe", 1952.
    """
    classes = found.shape[1]
    other = ~np.eye(classes, dtype=bool)
    counts, members = np.zeros((classes, classes)), np.zeros((classes, 1))
    share = np.zeros((classes, classes))
    np.add.at(counts, (seen, given), 1.0)
    np.add.at(members, taken_for, 1.0)
    np.add.at(share, taken_for, found.astype(float))
    share = share / np.maximum(members, 1) * other
    observable = share >= OBSERVABLE
    rates = counts / np.maximum(share, OBSERVABLE)
    anywhere = np.median(rates[observable]) if observable.any() else 0.0
    typical = np.array([[np.median(r[o]) if o.sum() > 2 else anywhere] for r, o in zip(rates, observable, strict=True)])
    chances = (counts + PRIOR * typical) / (share + PRIOR) * other
    total = chances.sum(1, keepdims=True)
    chances = np.where(total > 0, chances / np.maximum(total, 1e-300), other / (classes - 1))
    rng, every = np.random.default_rng(seed), []
    for _ in range(draws):
        reached = chances.cumsum(1)[labels] > rng.random((len(labels), 1))
        reached[:, -1] |= ~reached.any(1)  # where rounding left a sum just below 1
        drawn = reached.argmax(1)
        every.append(np.where(drawn == labels, (labels + 1) % classes, drawn))
    return np.stack(every)


def confirmed(verdict: Verdict, reference: Verdict, margins: np.ndarray) -> Verdict:
    """A verdict on labels, for the rows on which a model that was trained without them agrees with it.

    Who watched a probe learn wrong labels tells them from hard ones less well than who never saw them.

    Args:
        verdict: of a filter that watched a probe learn these labels.
        reference: of the other model's margins. Where it is too weak to tell, rows count to which it gives another
            label than their own.
        margins: as in ``by_exclusion``.
    """
    flagged = verdict.flagged & (margins > 0 if reference.threshold is None else reference.flagged)
    note = f"{int(verdict.flagged.sum() - flagged.sum())} rows are kept, because a model trained without them agrees"
    return Verdict(
        flagged,
        verdict.threshold,
        {**verdict.calibration, "note": note} if verdict.flagged.any() else verdict.calibration,
    )


def by_conflict(scores: np.ndarray) -> Verdict:
    """Flag rows whose label half or more of their equals contradict: evidence that needs no calibration."""
    return Verdict(scores > 0.4, 0.4, {"method": "conflicting evidence", "expected_fpr": 0.0})


def by_exclusion(
    groups: np.ndarray,
    margins: np.ndarray,
    canary_own: np.ndarray,
    canary_wrong: np.ndarray,
    labels: np.ndarray,
    *,
    most_agree: float = 0.25,
    like_canaries: float = 0.12,
    like_canaries_if_large: float = 0.22,
    large: float = 0.25,
) -> Verdict:
    """Judge each proposed group by a model that was trained without it.

    A group that belongs to its class is recognised as such, or nearly so. A group whose label comes from a trigger or a
    rule is not: without it, its rows look like what they were before, and contradict their labels as strongly as rows
    that were given a wrong label on purpose.

    Args:
        groups: int ``(N,)``, -1 where a row is in none.
        margins: largest logit of another class minus that of the label, ``(N,)``, by a model that was trained without
            any of the groups.
        canary_own: the same of the canaries under their own labels, ``(K,)``; the model was trained without them too.
        canary_wrong: under the wrong labels, ``(K,)``.
        labels: int ``(N,)``; a group lies within one class.
        most_agree: share of a group's rows that the model may give their label.
        like_canaries: least probability that a row of the group contradicts its label more than a canary does. Between
            two equal distributions it is one half. One standard error of the estimate is asked for on top.
        like_canaries_if_large: the same for groups that are more than ``large`` of their class: a model that never saw
            one of the two styles of a class does not recognise it, and takes it for the most similar class.
        large: share of a class.

    Guarantees:
        With fewer than ten canaries, or where the model recognises less than half of them under their own labels, no
        group is flagged.

    Reference:
        Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018, section 5
        (exclusionary reclassification).
    """
    flagged, found = np.zeros(len(groups), dtype=bool), []
    ordered = np.sort(canary_wrong)
    for group in np.unique(groups[groups >= 0]):
        rows = groups == group
        agree = float((margins[rows] < 0).mean())
        contradicts = float(np.searchsorted(ordered, margins[rows]).mean() / len(ordered)) if len(ordered) else 0.0
        error = np.sqrt((1 / rows.sum() + 1 / max(len(ordered), 1)) / 12)  # of a Mann-Whitney statistic
        share = float(rows.sum() / (labels == labels[rows][0]).sum())
        needed = like_canaries if share <= large else like_canaries_if_large
        bad = bool(agree <= most_agree and contradicts - error >= needed)
        flagged |= rows & bad & ((agree <= ALL_OF_IT) | (margins > 0))
        found.append(
            {
                "group": int(group),
                "rows": int(rows.sum()),
                "agree": agree,
                "like_canaries": contradicts,
                "share_of_class": share,
                "flagged": bad,
            }
        )
    recognised = float((canary_own < 0).mean()) if len(canary_own) else None
    evidence: dict[str, Any] = {
        "method": "training without the groups",
        "groups": found,
        "agree_of_canaries": recognised,
        "most_agree": most_agree,
        "like_canaries": like_canaries,
        "like_canaries_if_large": like_canaries_if_large,
    }
    if recognised is None or len(ordered) < LEAST_CANARIES:
        evidence["note"] = "too few canaries to compare the groups with: nothing is decided"
    elif recognised < RECOGNISED:
        evidence["note"] = "too weak a model to recognise even the canaries' own labels: nothing is decided"
    if "note" in evidence:
        flagged[:] = False
        for group in found:
            group["flagged"] = False
    return Verdict(flagged, None, evidence)


@dataclass(frozen=True)
class Outcome:
    """What becomes of each row.

    Attributes:
        touched: bool ``(N,)``: quarantined, dropped or down-weighted.
        capped: bool ``(N,)``: flagged, and kept because of a cap.
        notes: sentences for the report.
    """

    touched: np.ndarray
    capped: np.ndarray
    notes: list[str] = field(default_factory=list)


def decide(
    flagged: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    policy: Policy,
    restored: Sequence[int] | np.ndarray = (),
) -> Outcome:
    """Touch what some filter flags, within the caps.

    Args:
        flagged: bool ``(N,)`` by filter.
        scores: ``(N,)`` by filter; higher is more suspicious.
        labels: int ``(N,)``.
        policy: the caps.
        restored: rows that a person looked at and restored; they are kept whatever the filters say.

    Guarantees:
        At most ``max_drop`` of all rows and ``max_drop_per_class`` of a class are touched; restored rows never are.
    """
    n = len(labels)
    touched, severity = np.zeros(n, dtype=bool), np.zeros(n)
    for name, rows in flagged.items():
        touched |= rows
        ranks = np.empty(n)
        ranks[np.argsort(scores[name], kind="stable")] = np.arange(n) / max(n - 1, 1)
        severity += rows * (1 + ranks)
    touched[np.asarray(restored, dtype=int)] = False
    wanted, notes = touched.copy(), []

    def cap(among: np.ndarray, most: float, what: str) -> None:
        allowed, asked = int(most * among.sum()), int((touched & among).sum())
        if asked > allowed:
            order = np.flatnonzero(touched & among)
            order = order[np.argsort(-severity[order], kind="stable")]
            touched[order[allowed:]] = False
            notes.append(
                f"{asked} rows of {what} were flagged, and no more than {allowed} may be touched ({most:g}). A larger "
                "policy.max_drop or max_drop_per_class is your consent."
            )

    for label in np.unique(labels):
        cap(labels == label, policy.max_drop_per_class, f"class {label}")
    cap(np.ones(n, dtype=bool), policy.max_drop, "the data")
    return Outcome(touched, wanted & ~touched, notes)
