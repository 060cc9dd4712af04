"""A private training run, decided on before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from robust_train.privacy import accounting
from robust_train.privacy.accounting import ACCOUNTANTS, Segment


def default_delta(dataset_size: int) -> float:
    """``dataset_size ** -1.1``: below one over the number of examples, as delta has to be."""
    return float(dataset_size) ** -1.1


@dataclass(frozen=True)
class PrivacyPlan:
    """How much noise, on which batches, for how many steps. Needs no torch.

    Args:
        noise_multiplier: standard deviation of the noise, relative to ``max_grad_norm``; >= 0.
        sample_rate: probability of each example to enter a step, in (0, 1].
        dataset_size: number of examples, as the public knows it.
        steps: how many are planned, >= 1.
        delta: None: :func:`default_delta`; below ``1 / dataset_size``, or it would allow to publish an example.
        max_grad_norm: clipping norm, > 0; ``inf`` for none.
        accountant: ``"prv"`` or ``"rdp"``, which are upper bounds, or ``"gdp"``, an approximation.
        noise_schedule: factors on the noise multiplier for equal parts of the planned steps; the last holds beyond.

    Raises:
        ValueError: a value is out of range; the message names it.

    Example:
        >>> plan = PrivacyPlan.calibrated(3.0, sample_rate=2048 / 60000, dataset_size=60000, steps=1200, delta=1e-5)
        >>> plan.epsilon() <= 3.0 < plan.epsilon(steps=1210)
        True
    """

    noise_multiplier: float
    sample_rate: float
    dataset_size: int
    steps: int
    delta: float = None  # type: ignore[assignment]  # replaced at once
    max_grad_norm: float = 1.0
    accountant: str = "prv"
    noise_schedule: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not (isinstance(self.dataset_size, int) and self.dataset_size >= 1):
            raise ValueError(f"plan.dataset_size must be a whole number >= 1, got {self.dataset_size!r}")
        object.__setattr__(self, "noise_schedule", tuple(self.noise_schedule))
        if self.delta is None:
            object.__setattr__(self, "delta", default_delta(self.dataset_size))
        factors = self.noise_schedule
        for name, ok, wanted in (
            ("noise_multiplier", 0 <= self.noise_multiplier < math.inf, "a number >= 0"),
            ("sample_rate", 0 < self.sample_rate <= 1, "in (0, 1]"),
            ("steps", isinstance(self.steps, int) and self.steps >= 1, "a whole number >= 1"),
            ("delta", 0 < self.delta < 1, "in (0, 1)"),
            ("max_grad_norm", self.max_grad_norm > 0, "> 0"),
            ("accountant", self.accountant in ACCOUNTANTS, f"one of {', '.join(ACCOUNTANTS)}"),
            ("noise_schedule", bool(factors) and all(0 < f < math.inf for f in factors), "factors > 0"),
        ):
            if not ok:
                raise ValueError(f"plan.{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.delta >= 1 / self.dataset_size:
            raise ValueError(
                f"plan.delta={self.delta:g} promises nothing for {self.dataset_size} examples: publishing one of them "
                f"at random would keep to it. Choose it below 1 / dataset_size = {1 / self.dataset_size:.2g}"
            )

    @classmethod
    def calibrated(cls, target_epsilon: float, *, spent: Sequence[Segment] = (), **settings: Any) -> PrivacyPlan:
        """The plan with the least noise that keeps to a budget.

        Args:
            target_epsilon: of ``spent`` and the plan together.
            spent: what was spent on the same data before.
            settings: the plan's other fields.

        Raises:
            ValueError: see :func:`robust_train.privacy.accounting.calibrate`.
        """
        plan = cls(noise_multiplier=1.0, **settings)
        noise = accounting.calibrate(
            target_epsilon, plan.delta, plan.sample_rate, plan.steps, plan.accountant, spent, plan.noise_schedule
        )
        return replace(plan, noise_multiplier=noise)

    @property
    def expected_batch_size(self) -> float:
        """Examples in a step, on average."""
        return self.sample_rate * self.dataset_size

    @property
    def noise_of_mean(self) -> float:
        """Standard deviation of the noise in each coordinate of the mean gradient: it falls with the batch size."""
        return self.noise_multiplier * self.max_grad_norm / self.expected_batch_size

    def segments(self, from_step: int, to_step: int) -> list[Segment]:
        """The history that these steps of the plan make."""
        return accounting.segments(
            self.noise_multiplier, self.sample_rate, from_step, to_step, self.noise_schedule, self.steps
        )

    def noise_multiplier_at(self, step: int) -> float:
        """Of one step of the plan, counted from 0."""
        return self.segments(step, step + 1)[0][0]

    def epsilon(self, steps: int | None = None, spent: Sequence[Segment] = ()) -> float:
        """Of ``spent`` and the first ``steps`` of the plan; None: all that are planned."""
        ahead = self.segments(0, self.steps if steps is None else steps)
        return accounting.epsilon([*spent, *ahead], self.delta, self.accountant)

    def max_steps(self, target_epsilon: float, spent: Sequence[Segment] = (), begun: int = 0) -> int:
        """How many more steps a budget allows.

        Args:
            target_epsilon: the budget.
            spent: everything spent so far, with the ``begun`` steps of this plan.
            begun: steps of this plan that lie behind.

        Guarantees:
            See :func:`robust_train.privacy.accounting.max_steps`.
        """
        return accounting.max_steps(
            target_epsilon,
            self.noise_multiplier,
            self.sample_rate,
            self.delta,
            self.accountant,
            spent,
            noise_schedule=self.noise_schedule,
            planned_steps=self.steps,
            from_step=begun,
        )

    def trade_offs(self, epsilons: Sequence[float] = (1, 2, 3, 8)) -> list[tuple[str, float, PrivacyPlan]]:
        """What other budgets, batch sizes and lengths would take; batches and lengths at this plan's own epsilon.

        Args:
            epsilons: other budgets.

        Returns:
            ``(what changes, epsilon, plan)``, this plan first; without those that no amount of noise makes possible.
        """
        own = self.epsilon()
        twice, half = min(1.0, 2 * self.sample_rate), self.sample_rate / 2
        wanted = [(f"epsilon {value:g}", float(value), {}) for value in epsilons if abs(value / own - 1) > 0.02]
        wanted += [
            ("batch / 2", own, {"sample_rate": half, "steps": 2 * self.steps}),
            ("batch x 2", own, {"sample_rate": twice, "steps": max(1, round(self.steps * self.sample_rate / twice))}),
            ("epochs / 2", own, {"steps": max(1, self.steps // 2)}),
            ("epochs x 2", own, {"steps": 2 * self.steps}),
        ]
        rows: list[tuple[str, float, PrivacyPlan]] = [("this plan", own, self)]
        for change, target, settings in wanted:
            other = replace(self, **settings)
            try:
                noise = accounting.calibrate(
                    target, other.delta, other.sample_rate, other.steps, other.accountant, (), other.noise_schedule
                )
            except ValueError:
                continue
            rows.append((change, target, replace(other, noise_multiplier=noise)))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """As plain builtins."""
        return {**asdict(self), "noise_schedule": list(self.noise_schedule)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> PrivacyPlan:
        """The plan that ``to_dict`` wrote down."""
        return cls(**state)
