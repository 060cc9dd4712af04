"""What became of each example, and the rates that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from robust_train.evasion.sanity_checks import Flag
from robust_train.intervals import Rate, rate_of

CLEAN, ATTACK, CURVE, CORRUPTION = "clean", "attack/", "curve/", "corruption/"
MOST_CLASSES = 1000  # with more, rates by class would fill pages


@dataclass(frozen=True)
class Outcomes:
    """Scores of some examples: the share of each one's outputs that is right, 0 or 1 for plain classification.

    Attributes:
        scores: ``(B,)`` on the CPU by ``"clean"``, ``"attack/<name>"``, ``"curve/<eps>"`` and
            ``"corruption/<kind>/<severity>"``.
        labels: class indices ``(B,)``, or None where there is not one an example.
        groups: a group's name for each example, or None.
        examples: tensors of adversarial examples by name, for fewer of the rows or none.
    """

    scores: dict[str, Tensor]
    labels: Tensor | None = None
    groups: tuple[str, ...] | None = None
    examples: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores[CLEAN])

    def as_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """As tensors and texts, for a file."""
        tensors = {f"score/{name}": scores for name, scores in self.scores.items()}
        tensors |= {f"example/{name}": tensor for name, tensor in self.examples.items()}
        if self.labels is not None:
            tensors["labels"] = self.labels
        return tensors, {} if self.groups is None else {"groups": json.dumps(self.groups)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Outcomes:
        """What ``as_tensors`` returned.

        Raises:
            ValueError: there are no scores, or they differ in number.
        """

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        scores, labels = below("score/"), tensors.get("labels")
        groups = tuple(map(str, json.loads(about["groups"]))) if "groups" in about else None
        sizes = {len(t) if t.ndim == 1 else -1 for t in scores.values()}
        sizes |= {len(part) for part in (labels, groups) if part is not None}
        if CLEAN not in scores or len(sizes) != 1:
            raise ValueError("it holds no outcomes of an evaluation")
        return cls(scores, labels, groups, below("example/"))


def together(parts: Sequence[Outcomes]) -> Outcomes:
    """Outcomes of several batches as one.

    Args:
        parts: at least one; all with the same scores.
    """
    names = parts[0].scores
    labels = [part.labels for part in parts if part.labels is not None]
    groups = [part.groups for part in parts if part.groups is not None]
    examples = [part.examples for part in parts if part.examples]
    return Outcomes(
        {name: torch.cat([part.scores[name] for part in parts]) for name in names},
        torch.cat(labels) if len(labels) == len(parts) else None,
        tuple(name for part in groups for name in part) if len(groups) == len(parts) else None,
        {name: torch.cat([part[name] for part in examples]) for name in examples[0]} if examples else {},
    )


@dataclass(frozen=True)
class Evaluation:
    """Accuracies of one model, measured.

    Attributes:
        clean_acc: share of examples that are right when clean.
        robust_acc: share that is right when clean and under every attack that ran; of a model that draws at random the
            mean over ``draws`` draws.
        robust_acc_by_attack: the same for each attack alone.
        n: number of examples.
        threat: the threat in words.
        rates: 95 % intervals of all these: ``"clean_acc"``, ``"robust_acc"`` and ``"robust_acc_<attack>"``.
        curve: radius and robust accuracy at it, the first one 0 and clean; empty where none was asked for.
        by_class: of each class ``"clean_acc"`` and ``"robust_acc"``.
        by_group: the same of each group.
        corruptions: accuracy under each natural corruption, ``"<kind>/<severity>"``.
        flags: what speaks against trusting the numbers, named; see ``robust_train.evasion.sanity_checks``.
        checked: whether flags were looked for.
        draws: random passes that each verdict is the mean of; 1 for models that draw nothing.
    """

    clean_acc: float
    robust_acc: float
    robust_acc_by_attack: dict[str, float] = field(default_factory=dict)
    n: int = 0
    threat: str = ""
    rates: dict[str, Rate] = field(default_factory=dict)
    curve: tuple[tuple[float, Rate], ...] = ()
    by_class: dict[str, dict[str, Rate]] = field(default_factory=dict)
    by_group: dict[str, dict[str, Rate]] = field(default_factory=dict)
    corruptions: dict[str, Rate] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    checked: bool = False
    draws: int = 1

    @property
    def corruption_acc(self) -> float | None:
        """Mean accuracy over the corruptions, each kind over its severities first; None where none was measured.

        Reference:
            Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
            2019, section 4 (the mean accuracy, not divided by a reference model's).
        """
        kinds: dict[str, list[float]] = {}
        for name, rate in self.corruptions.items():
            kinds.setdefault(name.partition("/")[0], []).append(rate.value)
        means = [sum(values) / len(values) for values in kinds.values()]
        return sum(means) / len(means) if means else None

    def as_dict(self) -> dict[str, Any]:
        """As plain builtins, for JSON."""

        def plain(rates: Mapping[str, Rate]) -> dict[str, Any]:
            return {name: rate.as_dict() for name, rate in rates.items()}

        return {
            "n": self.n,
            "threat": self.threat,
            "draws": self.draws,
            "rates": plain(self.rates),
            "curve": [{"eps": eps, **rate.as_dict()} for eps, rate in self.curve],
            "by_class": {name: plain(rates) for name, rates in self.by_class.items()},
            "by_group": {name: plain(rates) for name, rates in self.by_group.items()},
            "corruptions": plain(self.corruptions),
            "corruption_acc": self.corruption_acc,
            "flags": [flag.as_dict() for flag in self.flags],
            "checked": self.checked,
        }

    def __str__(self) -> str:
        """A few lines to read: rates with their intervals, the hardest class and group, corruptions, flags."""
        lines = [f"{self.n} examples, {self.threat}"]
        if self.draws > 1:
            lines.append(f"the model draws at random: each verdict is the mean over {self.draws} draws")
        lines += [f"{name}: {rate}" for name, rate in self.rates.items()]
        lines += [f"eps {eps:.4g}: {rate}" for eps, rate in self.curve]
        for what, rates in (("class", self.by_class), ("group", self.by_group)):
            if rates:
                worst = min(rates, key=lambda name: rates[name]["robust_acc"].value)
                lines.append(f"hardest {what}: {worst}, robust_acc {rates[worst]['robust_acc']}")
        if self.corruption_acc is not None:
            lines.append(f"mean accuracy under natural corruptions: {100 * self.corruption_acc:.1f} %")
        lines += [f"WARNING, {flag}" for flag in self.flags]
        if self.checked and not self.flags:
            lines.append("sanity checks: nothing found")
        return "\n".join(lines)


def summary(
    outcomes: Outcomes, *, threat: str, flags: Iterable[Flag] = (), checked: bool = False, draws: int = 1
) -> Evaluation:
    """Rates and intervals from the outcomes of all examples.

    Args:
        outcomes: of all examples.
        threat: the threat in words.
        flags: what sanity checks found.
        checked: whether they were made.
        draws: random passes a verdict.
    """
    clean = outcomes.scores[CLEAN]
    attacked = _below(outcomes.scores, ATTACK)
    worst = torch.stack([clean, *attacked.values()]).amin(0)
    rates = {"clean_acc": rate_of(clean.tolist()), "robust_acc": rate_of(worst.tolist())}
    rates |= {f"robust_acc_{name}": rate_of(scores.tolist()) for name, scores in attacked.items()}
    curve = [(float(eps), rate_of(scores.tolist())) for eps, scores in _below(outcomes.scores, CURVE).items()]
    labels = None if outcomes.labels is None else [str(label) for label in outcomes.labels.tolist()]
    few = labels is not None and len(set(labels)) <= MOST_CLASSES
    return Evaluation(
        rates["clean_acc"].value,
        rates["robust_acc"].value,
        {name: rates[f"robust_acc_{name}"].value for name in attacked},
        len(clean),
        threat,
        rates,
        tuple([(0.0, rates["clean_acc"]), *sorted(curve, key=itemgetter(0))] if curve else []),
        _by(labels, clean, worst) if few and labels is not None else {},
        {} if outcomes.groups is None else _by(outcomes.groups, clean, worst),
        {name: rate_of(scores.tolist()) for name, scores in _below(outcomes.scores, CORRUPTION).items()},
        tuple(flags),
        checked,
        draws,
    )


def _below(scores: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): values for name, values in scores.items() if name.startswith(prefix)}


def _by(names: Sequence[str], clean: Tensor, worst: Tensor) -> dict[str, dict[str, Rate]]:
    """Rates of each part of the examples, numbers in their order and other names in the alphabet's."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    ordered = sorted(places, key=lambda name: (0, int(name), name) if name.lstrip("-").isdecimal() else (1, 0, name))
    return {
        name: {
            "clean_acc": rate_of(clean[places[name]].tolist()),
            "robust_acc": rate_of(worst[places[name]].tolist()),
        }
        for name in ordered
    }
