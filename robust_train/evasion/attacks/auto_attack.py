"""AutoAttack: four attacks one after the other, each on the examples that the others left standing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_train.evasion.attacks._checks import check_counts
from robust_train.evasion.attacks.apgd import APGD
from robust_train.evasion.attacks.apgd_targeted import APGDT
from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.attacks.fab import FAB
from robust_train.evasion.attacks.square import Square
from robust_train.evasion.margins import class_scores
from robust_train.evasion.randomness import generator_for
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim

VERSIONS = ("standard", "custom")
STANDARD = {"steps": 100, "targets": 9, "queries": 5000}


def members(
    norm: str, classes: int, *, steps: int = 100, targets: int = 9, queries: int = 5000
) -> dict[str, APGD | APGDT | FAB | Square]:
    """The attacks by name, in the order in which they run.

    The targeted difference of logits ratio needs four classes. With fewer, APGD on the untargeted one takes its place
    (with two classes: on the margin), and its name says so.

    Args:
        norm: the threat's. In L1 APGD on cross-entropy has 5 restarts and APGD-T 5 targets, as in the standard.
        classes: of the task.
        steps: of each run of APGD and FAB.
        targets: wrong classes of APGD-T and FAB-T.
        queries: of Square.
    """
    sparse = norm == "l1"
    second: APGD | APGDT = (
        APGD(steps, loss="dlr") if classes < 4 else APGDT(steps, min(5, targets) if sparse else targets)
    )
    return {
        "apgd-ce": APGD(steps, restarts=5 if sparse else 1),
        "apgd-dlr" if classes < 4 else "apgd-t": second,
        "fab-t": FAB(steps, targets),
        "square": Square(queries),
    }


def auto_attack(
    victim: Victim, x: Tensor, threat: Threat, attacks: Mapping[str, Attack], generator: torch.Generator | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Run attacks one after the other, each on the examples that are still right.

    Args:
        victim: the model under attack; it needs logits ``(B, classes)`` and labels.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        attacks: by name, for example ``members("linf", classes=10)``.
        generator: source of all randomness; None: a fresh one with seed 0. Each attack draws from a stream of its own,
            which depends on the generator's state and on its name.

    Returns:
        Adversarial inputs ``(B, ...)`` in ``x``'s dtype: the first that the model got wrong, asked again at the final
        point and in its own precision; and how many examples are right when clean (``"clean"``) and after each
        attack, in order.

    Guarantees:
        The counts never rise, and no attack of the sequence alone, with the same stream, leaves fewer standing than
        the whole.
    """
    generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    right = victim.score(x) > 0
    counts, found = {"clean": int(right.sum())}, x.clone()
    # outside verdicts the first attack sees all examples, so that a high loss is found for those that are wrong too
    alive = right.nonzero().flatten() if victim.stop_when_fooled else torch.arange(len(x), device=x.device)
    for i, (name, attack) in enumerate(attacks.items()):
        if len(alive):
            part = victim if len(alive) == len(x) else victim.take(alive)
            here = attack(part, x[alive], threat, generator_for(x.device, name, seed))
            standing = part.score(here) > 0
            kept = torch.ones_like(standing) if i == 0 else ~standing
            found[alive[kept]] = here[kept]
            right[alive[~standing]] = False
            alive = alive[standing]
        counts[name] = int(right.sum())
    return found, counts


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The standard ensemble: APGD on cross-entropy, targeted APGD, targeted FAB and Square.

    Args:
        version: ``"standard"``, or ``"custom"`` for other counts than the standard's; results of such runs must not be
            called AutoAttack.
        steps: of each run of APGD and FAB; 100 in the standard.
        targets: wrong classes of targeted APGD and FAB; 9 in the standard.
        queries: of Square; 5000 in the standard.

    Raises:
        ValueError: a setting is out of range, or differs from the standard in the standard version; when it runs, a
            task without one class an example.

    Guarantees:
        Of each example the worst case: an example that one of the four fools is fooled.

    Reference:
        Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", 2020, section 6; for L1 Croce & Hein, "Mind the Box", 2021, section 5.
    """

    family: ClassVar[str] = "ensemble"

    version: str = "standard"
    steps: int = 100
    targets: int = 9
    queries: int = 5000

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"auto_attack.version must be one of {', '.join(VERSIONS)}, got {self.version!r}")
        check_counts("auto_attack", steps=self.steps, targets=self.targets, queries=self.queries)
        for name, value in STANDARD.items():
            if self.version == "standard" and getattr(self, name) != value:
                raise ValueError(
                    f"auto_attack.{name} is {value} in the standard version, got {getattr(self, name)}; for other "
                    "counts set auto_attack.version=custom, and do not call the result AutoAttack"
                )

    def __str__(self) -> str:
        counts = f"APGD and FAB {self.steps} steps, {self.targets} targets, Square {self.queries} queries"
        if self.version == "standard":
            return f"AutoAttack, standard version ({counts})"
        return f"the attacks of AutoAttack, not the standard version ({counts})"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss", "per_example_loss", "logits", "labels"})

    @property
    def passes(self) -> float:
        return sum(attack.passes for attack in self.members("linf", 10).values())

    def members(self, norm: str, classes: int) -> dict[str, APGD | APGDT | FAB | Square]:
        """The attacks by name, for a norm and a number of classes; see the function ``members``."""
        return members(norm, classes, steps=self.steps, targets=self.targets, queries=self.queries)

    def survivors(
        self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, int]]:
        """Attack a batch as a call does, and count what each attack left standing.

        Returns:
            Adversarial inputs ``(B, ...)`` and ``{"clean": …, "apgd-ce": …, "apgd-t": …, "fab-t": …, "square": …}``;
            the second attack is called ``"apgd-dlr"`` where there are fewer than four classes.

        Raises:
            ValueError: the task does not have one class an example.
        """
        with victim.undisturbed(), torch.no_grad():
            scores, _ = class_scores(victim.logits(x), victim.known_labels())
            attacks = self.members(threat.norm, scores.shape[1])
            return auto_attack(victim, x, threat, attacks, generator)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        return self.survivors(victim, x, threat, generator)[0]
