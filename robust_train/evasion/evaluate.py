"""Honest evaluation: of each example the worst case over the attacks that ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from robust_train.evasion.attacks._checks import is_number
from robust_train.evasion.attacks.base import Attack, what_holds
from robust_train.evasion.attacks.each_threat import EachThreat
from robust_train.evasion.attacks.pgd import PGD
from robust_train.evasion.corruptions import Corruptions
from robust_train.evasion.draws import ManyDraws, in_draws
from robust_train.evasion.examples import AdversarialExamples, adversarial_examples
from robust_train.evasion.outcomes import Evaluation, Outcomes, summary, together
from robust_train.evasion.probing import needed_draws, sanity_checks
from robust_train.evasion.randomness import generator_for, preserved_rng
from robust_train.evasion.sanity_checks import Flag
from robust_train.evasion.shards import Shards, data_digest, model_digest, settings_text
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import ClassifierVictim, Victim

CURVE_STEPS = 20


@dataclass(frozen=True)
class Verdicts:
    """What attacks did to one batch.

    Attributes:
        clean: score of each clean example ``(B,)`` (share of its outputs that is right), or its loss; a scalar loss
            where only the batch's mean is known.
        attacked: the same under each attack.
        adversarial: inputs that each attack found ``(B, ...)``.
        is_loss: the numbers are losses (higher is worse), because the task has no classes.
    """

    clean: Tensor
    attacked: dict[str, Tensor]
    adversarial: dict[str, Tensor]
    is_loss: bool

    @property
    def worst(self) -> Tensor:
        """The worst case over clean inputs and all attacks, shaped like ``clean``."""
        every = torch.stack([self.clean, *self.attacked.values()])
        return every.amax(0) if self.is_loss else every.amin(0)


def judge(victim: Victim, x: Tensor, threat: Threat, attacks: Mapping[str, Attack], *seed: int | str) -> Verdicts:
    """Run every attack on one batch and score what it found.

    Args:
        victim: the model under attack; with ``stop_when_fooled`` examples leave an attack once they are misclassified.
        x: clean inputs ``(B, ...)``.
        threat: what the attacker may do.
        attacks: attacks by name. Each starts from the examples that are right when clean: the others are fooled
            already, and what one attack finds does not change the number reported for another.
        seed: parts of the seed; attacks draw from streams of their own.

    Returns:
        Verdicts. Classification where the victim provides logits and labels, else losses.
    """
    if not {"logits", "labels"} <= victim.provides:
        with torch.no_grad():
            clean = victim.loss(x).detach()
        found = {n: a(victim, x, threat, generator_for(x.device, n, *seed)) for n, a in attacks.items()}
        with torch.no_grad():
            losses = {n: victim.loss(x_adv).detach() for n, x_adv in found.items()}
        return Verdicts(clean, losses, found, is_loss=True)
    clean = victim.score(x)
    standing = (clean > 0).nonzero().flatten() if victim.stop_when_fooled else torch.arange(len(x), device=x.device)
    scores, found = {}, {}
    for name, attack in attacks.items():
        score, x_adv = clean.clone(), x.clone()
        if len(standing):
            part = victim if len(standing) == len(x) else victim.take(standing)
            x_adv[standing] = attack(part, x[standing], threat, generator_for(x.device, name, *seed))
            # an attack may do nothing instead: what it found counts only where it is worse than the clean input
            score[standing] = torch.minimum(part.score(x_adv[standing]), clean[standing])
        scores[name], found[name] = score, x_adv
    return Verdicts(clean, scores, found, is_loss=False)


def outcomes_of(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    attacks: Mapping[str, Attack],
    *seed: int | str,
    curve: Sequence[float] = (),
    corruptions: Corruptions | None = None,
    groups: tuple[str, ...] | None = None,
    examples: int = 0,
) -> Outcomes:
    """Everything that is measured of one batch of a classification, example by example.

    Args:
        victim: as in ``judge``; it provides logits and labels.
        x: as in ``judge``.
        threat: as in ``judge``.
        attacks: as in ``judge``.
        seed: as in ``judge``.
        curve: multiples of ``threat.eps``, each attacked with PGD-20.
        corruptions: natural corruptions to measure, too.
        groups: a group's name for each example.
        examples: of how many rows the adversarial examples are kept.
    """
    verdicts = judge(victim, x, threat, attacks, *seed)
    scores = {"clean": verdicts.clean} | {f"attack/{name}": score for name, score in verdicts.attacked.items()}
    many = victim.draws if isinstance(victim, ManyDraws) else 1
    _, pgd = in_draws(victim, {"pgd": EachThreat(PGD(steps=CURVE_STEPS))}, many)
    for factor in curve:
        radius = threat.scaled(factor)
        scores[f"curve/{radius.radius!r}"] = judge(victim, x, radius, pgd, *seed, "curve").worst
    if corruptions is not None:
        for name, corrupted in corruptions.of(x, threat, *seed):
            scores[f"corruption/{name}"] = victim.score(corrupted)
    labels, kept = _class_labels(victim), {}
    if examples and labels is not None:
        first = torch.arange(min(examples, len(x)), device=x.device)
        part = victim if len(first) == len(x) else victim.take(first)
        found = {name: inputs[first] for name, inputs in verdicts.adversarial.items()}
        each = {name: score[first] for name, score in verdicts.attacked.items()}
        kept = adversarial_examples(part, x[first], found, each, verdicts.clean[first])
    return Outcomes({name: score.float().cpu() for name, score in scores.items()}, labels, groups, kept)


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    threat: Threat,
    attacks: Mapping[str, Attack] | Attack | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    curve: Sequence[float] = (),
    groups: int | Sequence[Any] | Tensor | None = None,
    corruptions: Corruptions | None = None,
    checks: bool = True,
    draws: int | None = None,
    shards: str | Path | None = None,
    examples: str | Path | None = None,
    most_examples: int = 64,
) -> Evaluation:
    """Measure any torch classifier; no Lightning needed.

    Args:
        model: ``x -> logits (B, classes)``, or one logit an example; judged in eval mode.
        loader: yields ``(x, labels, ...)``.
        threat: what the attacker may do.
        attacks: attacks by name, or one; None: ``PGD(steps=50)``.
        limit: stop after this many examples; None: all.
        seed: seed of the attacks' randomness.
        curve: multiples of ``threat.eps`` at which robust accuracy is measured too, each under PGD-20.
        groups: for rates by group: the place of the group in the batch, such as 2, or a name for each example in the
            loader's order.
        corruptions: natural corruptions to measure, such as ``Corruptions()``.
        checks: look for signs that the result is fooled, on the first 64 examples of the first batch; see
            ``sanity_checks`` for the cost.
        draws: random passes a verdict, and samples of EOT around each attack. None: 1, or 10 where the model is found
            to draw at random.
        shards: folder for what each batch came to; the same call goes on where it stopped. The loader must not shuffle.
        examples: file for adversarial examples, as safetensors; ``AdversarialExamples.read`` reads it.
        most_examples: how many of the first rows it holds.

    Returns:
        Evaluation: worst case over the attacks.

    Raises:
        ValueError: the loader is empty, inputs do not fit the threat, a setting is out of range, or ``shards`` holds
            another evaluation.

    Guarantees:
        Parameters, ``.grad``, buffers and modes of the model and the global random state are as before, also after an
        exception. The same call gives the same result, with shards or without.
    """
    attacks = {"pgd": PGD(steps=50)} if attacks is None else attacks
    named = {type(attacks).__name__.lower(): attacks} if isinstance(attacks, Attack) else dict(attacks)
    _check(named, threat, curve, limit=limit, draws=draws, most_examples=most_examples)
    if shards is not None or not (groups is None or isinstance(groups, int)):
        _check_order(loader)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts: list[Outcomes] = []
    flags: tuple[Flag, ...] = ()
    store, n = None, 0
    with preserved_rng(device), ClassifierVictim(model, torch.zeros(0)).undisturbed():
        model.eval()
        for i, (x, labels, *rest) in enumerate(loader):
            keep = len(x) if limit is None else min(len(x), limit - n)
            x, labels = x[:keep].to(device), labels[:keep].to(device)
            threat.check_input(x)
            victim = ClassifierVictim(model, labels, stop_when_fooled=True)
            if i == 0:
                if checks:
                    training = [name for name, module in model.named_modules() if module.training]
                    flags = sanity_checks(
                        victim, x, threat, outputs=lambda _, x: model(x), training=training, draws=draws, seed=seed
                    )
                if draws is None:
                    draws = needed_draws(victim, x, flags if checks else None, seed=seed)
                if shards is not None:
                    kept = 0 if examples is None else most_examples
                    store = Shards(shards, plan(model, threat, named, seed, draws or 1, curve, corruptions, kept))
            judged, attacking = in_draws(victim, named, draws or 1)
            run = partial(outcomes_of, judged, x, threat, attacking, seed, i)
            more = {
                "curve": curve,
                "corruptions": corruptions,
                "groups": _groups(groups, [x, labels, *rest], n, keep),
                "examples": 0 if examples is None else max(most_examples - n, 0),
            }
            if store is None:
                parts.append(run(**more))
            else:
                digest = data_digest(x, labels, more["groups"])
                parts.append(store.judged(f"{i:06d}", digest, partial(run, **more)))
            n += keep
            if limit is not None and n >= limit:
                break
    if n == 0:
        raise ValueError("there is nothing to evaluate: the loader is empty, or limit is 0")
    every = together(parts)
    within = what_holds(named.values(), threat)
    if examples is not None:
        AdversarialExamples.of(every.examples, list(named), within).write(examples)
    return summary(every, threat=within, flags=flags, checked=checks, draws=draws or 1)


def plan(
    model: nn.Module,
    threat: Threat,
    attacks: Mapping[str, Attack],
    seed: int,
    draws: int,
    curve: Sequence[float] = (),
    corruptions: Corruptions | None = None,
    examples: int = 0,
) -> dict[str, Any]:
    """All that the outcomes on a batch depend on, for ``Shards``."""
    return {
        "model": model_digest(model),
        "threat": settings_text(threat),
        "attacks": settings_text(attacks),
        "seed": seed,
        "draws": draws,
        "curve": list(curve),
        "corruptions": settings_text(corruptions),
        "examples": examples,
    }


def _check(attacks: Mapping[str, Any], threat: Threat, curve: Sequence[float], **counts: int | None) -> None:
    """Refuse settings that are found to be wrong only when hours have passed, or never."""
    if not attacks:
        raise ValueError("evaluate: attacks must hold at least one attack")
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise TypeError(f"evaluate: attacks.{name} must be a robust_train Attack, got {attack!r}")
        attack.check(threat)
    for factor in curve:
        if not is_number(factor) or factor < 0:
            raise ValueError(f"evaluate: curve must hold multiples of threat.eps, numbers >= 0, got {factor!r}")
    for name, value in counts.items():
        least = 0 if name == "limit" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"evaluate: {name} must be a whole number >= {least}, got {value!r}")


def _check_order(loader: Any) -> None:
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        raise ValueError("evaluate: shards, and groups by row, need a loader that does not shuffle: set shuffle=False")


def _groups(groups: Any, batch: Sequence[Any], begin: int, size: int) -> tuple[str, ...] | None:
    """The names of the groups of a batch's examples."""
    if groups is None:
        return None
    if isinstance(groups, int):
        if not -len(batch) <= groups < len(batch):
            raise ValueError(f"evaluate: groups={groups}, but a batch has {len(batch)} parts")
        part = batch[groups][:size]
    else:
        part = groups[begin : begin + size]
    names = part.tolist() if isinstance(part, Tensor) else list(part)
    if len(names) != size:
        raise ValueError(f"evaluate: groups must name one for each example, but there are none from {begin} on")
    return tuple(map(str, names))


def _class_labels(victim: Victim) -> Tensor | None:
    """Class indices ``(B,)`` on the CPU, or None where there is not one an example."""
    labels = victim.known_labels().detach().cpu()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.flatten()
    return labels.long() if labels.ndim == 1 and bool((labels == labels.round()).all()) else None
