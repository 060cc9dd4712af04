"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.base import Attack, working_precision
from robust_train.evasion.threat import Threat, parse_number
from robust_train.evasion.victim import Victim, input_gradient

TARGETS = ("least_likely", "next", "random")


def pgd(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    targets: Tensor | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Repeated steepest-ascent steps on the victim's loss, each projected onto ball and box.

    Args:
        victim: the model under attack.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        steps: gradient steps a restart, >= 1.
        step_size: length of a step in pixels (see ``Threat.ascend``); None: ``2.5 * eps / steps``.
        restarts: independent runs; of each example the one with the highest loss is kept (of the whole batch where the
            victim knows only its mean loss).
        random_start: begin at a uniform point of the ball instead of at ``x``.
        targets: class labels to be approached; None moves away from the true ones.
        start: where to begin instead, ``(B, ...)``.
        generator: source of the random starts; None: a fresh one with seed 0.

    Returns:
        Tensor of ``x``'s shape, in working precision. Where ``victim.stop_when_fooled``, examples leave the attack as
        soon as one of their iterates is misclassified, and that iterate is returned.

    Reference:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    step_size = 2.5 * threat.radius / steps if step_size is None else step_size
    clean = working_precision(x)
    best, best_loss = clean.clone(), None
    alive = torch.arange(len(x), device=x.device)  # examples that are not fooled yet
    judged = victim.stop_when_fooled
    goal = victim if targets is None else victim.relabelled(targets)
    sign = 1.0 if targets is None else -1.0
    for _ in range(restarts):
        origin = clean[alive]
        if start is not None:
            here = working_precision(start)[alive]
        else:
            here = threat.random_start(origin, generator) if random_start else origin
        limits = threat.limits(origin)
        for _ in range(steps):
            part = goal if len(alive) == len(x) else goal.take(alive)
            grad, _, score = input_gradient(part, here.to(x.dtype))
            if judged and targets is None and score is not None and bool((score == 0).any()):
                standing = score > 0
                best[alive[~standing]] = here[~standing]
                alive, origin, here, grad = alive[standing], origin[standing], here[standing], grad[standing]
                if len(alive) == 0:
                    return best
                limits = threat.limits(origin)
            step = threat.ascend(sign * grad.to(clean.dtype), step_size)
            here = threat.project(here + step, origin, limits)
        if restarts == 1:
            best[alive] = here
            return best
        part = goal if len(alive) == len(x) else goal.take(alive)
        if judged and targets is None and bool((fooled := part.score(here.to(x.dtype)) == 0).any()):
            best[alive[fooled]] = here[fooled]
            alive, here = alive[~fooled], here[~fooled]
            if len(alive) == 0:
                return best
            part = goal.take(alive)
        with torch.no_grad():
            loss = sign * part.loss(here.to(x.dtype)).detach()
            if best_loss is None:
                best_loss = torch.full((len(x),) if loss.ndim else (), -torch.inf, dtype=loss.dtype, device=x.device)
            if loss.ndim:
                better = loss > best_loss[alive]
                best[alive[better]], best_loss[alive[better]] = here[better], loss[better]
            elif loss > best_loss:
                best, best_loss = here.clone(), loss
    return best


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent, in every norm of the threat.

    Args:
        steps: gradient steps a restart, >= 1.
        step_size: length of a step in pixels, a number or ``"2/255"``; None: ``2.5 * eps / steps``.
        restarts: independent runs, >= 1.
        random_start: begin each run at a uniform point of the ball.
        targeted: None, or which wrong class to approach: ``"least_likely"``, ``"next"`` or ``"random"``.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1.
    """

    steps: int = 10
    step_size: float | str | None = None
    restarts: int = 1
    random_start: bool = True
    targeted: str | None = None

    def __post_init__(self) -> None:
        check_counts("pgd", steps=self.steps, restarts=self.restarts)
        if not isinstance(self.random_start, bool):
            raise ValueError(f"pgd.random_start must be true or false, got {self.random_start!r}")
        if self.step_size is not None:
            size = parse_number("pgd.step_size", self.step_size)
            if not 0 < size < float("inf"):
                raise ValueError(f"pgd.step_size must be > 0 and finite, got {self.step_size}")
            object.__setattr__(self, "step_size", size)
        if self.targeted is not None and self.targeted not in TARGETS:
            raise ValueError(f"pgd.targeted must be one of {', '.join(TARGETS)} or null, got {self.targeted!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss"} if self.targeted is None else {"loss", "logits", "labels"})

    @property
    def passes(self) -> float:
        return float(self.steps * self.restarts)

    @property
    def starts_at_clean_input(self) -> bool:
        return not self.random_start

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return pgd(
            victim,
            x,
            threat,
            steps=self.steps,
            step_size=None if self.step_size is None else float(self.step_size),
            restarts=self.restarts,
            random_start=self.random_start,
            targets=None if self.targeted is None else _targets(self.targeted, victim, x, generator),
            generator=generator,
        )


def _targets(kind: str, victim: Victim, x: Tensor, generator: torch.Generator) -> Tensor:
    """A wrong class for each example ``(B,)``."""
    with torch.no_grad():
        logits = victim.logits(x)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"a targeted attack needs logits (B, classes), got {tuple(logits.shape)}")
    labels, classes = victim.known_labels(), logits.shape[1]
    truth = (labels.argmax(1) if labels.is_floating_point() else labels).long()
    if kind == "next":
        return (truth + 1) % classes
    if kind == "random":
        offset = torch.randint(1, classes, truth.shape, generator=generator, device=generator.device)
        return (truth + offset.to(truth.device)) % classes
    return logits.scatter(1, truth[:, None], torch.inf).argmin(1)
