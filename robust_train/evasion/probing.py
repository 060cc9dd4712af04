"""A few examples of the test set, on which the model is asked what the sanity checks need to know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.fgsm import FGSM
from robust_train.evasion.attacks.pgd import PGD
from robust_train.evasion.attacks.square import Square
from robust_train.evasion.draws import in_draws
from robust_train.evasion.margins import class_scores, margin
from robust_train.evasion.randomness import generator_for, preserved_rng
from robust_train.evasion.sanity_checks import (
    Flag,
    black_box_stronger,
    depends_on_batch,
    inputs_out_of_bounds,
    nonfinite_gradients,
    one_step_stronger,
    probability_outputs,
    randomised_outputs,
    train_mode,
    unbounded_attack_fails,
    zero_gradients,
)
from robust_train.evasion.threat import Threat
from robust_train.evasion.threat_union import members_of
from robust_train.evasion.victim import Victim

ROWS, STEPS, QUERIES, PASSES = 64, 20, 200, 3
DRAWS = 10  # of a model that draws at random, unless another number is asked for


def sanity_checks(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    outputs: Callable[[Victim, Tensor], Tensor] | None = None,
    training: Sequence[str] = (),
    draws: int | None = None,
    rows: int = ROWS,
    seed: int = 0,
) -> tuple[Flag, ...]:
    """Run every check that the model allows on the first rows of a batch.

    It costs at most 2 gradients, 8 forward passes, FGSM, PGD with 20 steps at three radii and Square with 200 queries:
    about 170 forward-backward passes over 64 examples, fewer where they are fooled early. That is as much as PGD-50 on
    210 examples. With several draws the attacks cost as many times more.

    Args:
        victim: the model under attack; only one with ``stop_when_fooled`` is attacked, others are asked and no more.
        x: clean inputs ``(B, ...)``.
        threat: what the attacker may do.
        outputs: what the model of a part of the victim returns for inputs, before anything is made of it; None: that is
            not known.
        training: names of layers that are in training mode.
        draws: random passes a verdict of the evaluation; None: 1, or ``DRAWS`` where the model draws at random.
        rows: how many examples are looked at.
        seed: of the attacks, and of what a randomised model draws.

    Returns:
        A flag for each sign of trouble, in the order in which they were looked for.

    Guarantees:
        The model and the global random state are as before.
    """
    part = victim if len(x) <= rows else victim.take(torch.arange(rows, device=x.device))
    x = x[:rows].detach()
    with preserved_rng(x.device), part.undisturbed():
        flags = [inputs_out_of_bounds(x, threat), train_mode(training)]
        if outputs is not None:
            with torch.no_grad():
                flags.append(probability_outputs(outputs(part, x)))
        random = _random(part, x, seed, DRAWS if draws is None else draws)
        flags.append(random)
        if random is None:  # scores that differ by themselves differ in parts of a batch too
            flags.append(_batch(part, x))
        gradients, margins, scores = _gradients(part, x)
        seen = torch.zeros_like(x) if gradients is None else gradients
        asked = _right(part, x)
        flags += [
            zero_gradients(seen[asked], None if margins is None else margins[asked]),
            nonfinite_gradients(seen, scores),
        ]
        # in L0 there are no steps along gradients to compare with
        if gradients is not None and margins is not None and part.stop_when_fooled and threat.norm != "l0":
            averaged = 1 if random is None else int(random.evidence.get("draws", 1))
            flags += _attacked(part, x, members_of(threat)[0], seed, averaged)
    return tuple(flag for flag in flags if flag is not None)


def _random(victim: Victim, x: Tensor, seed: int, draws: int) -> Flag | None:
    passes = []
    for draw in range(PASSES):
        with torch.no_grad(), victim.reseeded(1000 * seed + draw):
            passes.append(_answer(victim, x))
    return randomised_outputs(passes, draws)


def _right(victim: Victim, x: Tensor) -> Tensor:
    """The examples that an attacker has to move: those that are right when clean, or all where none is, or no class."""
    everyone = torch.arange(len(x), device=x.device)
    if not {"logits", "labels"} <= victim.provides:
        return everyone
    right = (victim.score(x) > 0).nonzero().flatten()
    return right if len(right) else everyone


def _batch(victim: Victim, x: Tensor) -> Flag | None:
    if len(x) < 2 or not victim.stop_when_fooled:
        return None
    half = torch.arange((len(x) + 1) // 2, device=x.device)
    with torch.no_grad():
        alone = _answer(victim.take(half), x[half])
        return depends_on_batch(alone, _answer(victim, x)[: len(half)])


def _answer(victim: Victim, x: Tensor) -> Tensor:
    return victim.logits(x) if "logits" in victim.provides else victim.loss(x).reshape(-1)


def _gradients(victim: Victim, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the loss and of the margin between two classes, None where there is none, and the scores."""
    inputs = x.clone().requires_grad_(True)
    with torch.enable_grad():
        loss = _gradient(victim.loss(inputs), inputs, victim.gradient_scale)
        if not {"logits", "labels"} <= victim.provides:
            return loss, None, None
        logits = victim.logits(inputs)
        try:
            scores, truth = class_scores(logits, victim.known_labels())
        except ValueError:  # dense predictions
            return loss, None, logits.detach()
        return loss, _gradient(margin(scores, truth), inputs, victim.gradient_scale), logits.detach()


def _gradient(loss: Tensor, x: Tensor, scale: float) -> Tensor | None:
    if not loss.requires_grad:
        return None
    return torch.autograd.grad(loss.float().sum() * scale, x, allow_unused=True)[0]


def _attacked(victim: Victim, x: Tensor, threat: Threat, seed: int, draws: int) -> list[Flag | None]:
    """What attacks of different kinds find on the examples that are right when clean."""
    scored, _ = in_draws(victim, {}, draws)
    right = (scored.score(x) >= 0.5).nonzero().flatten()
    if len(right) == 0:
        return []
    part, clean = victim.take(right), x[right]

    def fooled(attack: Attack, within: Threat, among: Tensor) -> Tensor:
        """Which of ``among``, numbers of examples, are fooled; as a mask over all."""
        mask = torch.zeros(len(clean), dtype=torch.bool, device=x.device)
        if len(among):
            rows, attacks = in_draws(part.take(among), {"checks": attack}, draws)
            found = attacks["checks"](rows, clean[among], within, generator_for(x.device, "checks", seed))
            mask[among] = rows.score(found) < 0.5
        return mask

    everyone = torch.arange(len(clean), device=x.device)
    one, many = fooled(FGSM(), threat, everyone), fooled(PGD(STEPS), threat, everyone)
    white, flags = one | many, [one_step_stronger(one, many)]
    if clean.ndim in (2, 4):
        flags.append(black_box_stronger(fooled(Square(QUERIES), threat, everyone), white))
    if threat.mutable is None:
        reach = _unbounded(clean, threat)
        for factor in (0.5, 1.0):
            white = white | fooled(PGD(STEPS), replace(threat, eps=factor * reach), (~white).nonzero().flatten())
        flags.append(unbounded_attack_fails(white, reach))
    return flags


def _unbounded(x: Tensor, threat: Threat) -> float:
    """A radius within which every input of the range lies, or of the data's own range where there is none."""
    pixels = threat.to_pixels(x)
    width = float((torch.as_tensor(threat.high) - torch.as_tensor(threat.low)).max())
    if not math.isfinite(width):
        width = float(pixels.max() - pixels.min()) or 1.0
    features = x[0].numel()
    return width * {"linf": 1.0, "l2": math.sqrt(features), "l1": float(features)}[threat.norm]


def needed_draws(victim: Victim, x: Tensor, flags: Sequence[Flag] | None = None, *, seed: int = 0) -> int:
    """Random passes a verdict: several where the model draws at random.

    Args:
        victim: the model under attack; afterwards it is as before.
        x: clean inputs ``(B, ...)``, of which the first are looked at.
        flags: what sanity checks found; None: they were not made, and three forward passes are.
        seed: of what the model draws.
    """
    if flags is None:
        part = victim if len(x) <= ROWS else victim.take(torch.arange(ROWS, device=x.device))
        with preserved_rng(x.device), part.undisturbed():
            found = _random(part, x[:ROWS].detach(), seed, 1)
        flags = [] if found is None else [found]
    return DRAWS if any(flag.name == "randomised_outputs" for flag in flags) else 1
