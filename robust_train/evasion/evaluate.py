"""Honest evaluation: of each example the worst case over the attacks that ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.pgd import PGD
from robust_train.evasion.randomness import generator_for
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import ClassifierVictim, Victim


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


@dataclass(frozen=True)
class Evaluation:
    """Accuracies of one model, measured.

    Attributes:
        clean_acc: share of examples that are right when clean.
        robust_acc: share that is right when clean and under every attack that ran.
        robust_acc_by_attack: the same for each attack alone.
        n: number of examples.
        threat: the threat in words.
    """

    clean_acc: float
    robust_acc: float
    robust_acc_by_attack: dict[str, float] = field(default_factory=dict)
    n: int = 0
    threat: str = ""


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    threat: Threat,
    attacks: Mapping[str, Attack] | Attack | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure any torch classifier; no Lightning needed.

    Args:
        model: ``x -> logits (B, classes)``; judged in eval mode, and put back into the mode it was in.
        loader: yields ``(x, labels, ...)``.
        threat: what the attacker may do.
        attacks: attacks by name, or one; None: ``PGD(steps=50)``.
        limit: stop after this many examples; None: all.
        seed: seed of the attacks' randomness.

    Returns:
        Evaluation: worst case over the attacks.

    Raises:
        ValueError: the loader is empty, or inputs do not fit the threat.
    """
    attacks = {"pgd": PGD(steps=50)} if attacks is None else attacks
    named = {type(attacks).__name__.lower(): attacks} if isinstance(attacks, Attack) else dict(attacks)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    clean, worst, n = 0.0, 0.0, 0
    by_attack = dict.fromkeys(named, 0.0)
    try:
        for i, (x, labels, *_) in enumerate(loader):
            keep = len(x) if limit is None else min(len(x), limit - n)
            x, labels = x[:keep].to(device), labels[:keep].to(device)
            threat.check_input(x)
            verdicts = judge(ClassifierVictim(model, labels, stop_when_fooled=True), x, threat, named, seed, i)
            clean, worst, n = clean + float(verdicts.clean.sum()), worst + float(verdicts.worst.sum()), n + keep
            for name, score in verdicts.attacked.items():
                by_attack[name] += float(score.sum())
            if limit is not None and n >= limit:
                break
    finally:
        for module, training in modes:
            module.training = training
    if n == 0:
        raise ValueError("there is nothing to evaluate: the loader is empty, or limit is 0")
    return Evaluation(clean / n, worst / n, {k: v / n for k, v in by_attack.items()}, n, threat.describe())
