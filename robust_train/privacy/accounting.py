"""What a history of noisy steps cost, how many more fit into a budget, and how much noise a budget takes.

A history is a sequence of segments ``(noise_multiplier, sample_rate, steps)`` of one mechanism: every example joins a
step with probability ``sample_rate`` on its own (Poisson sampling), the sum of what was clipped to norm C gets Gaussian
noise of standard deviation ``noise_multiplier * C``. Neighbouring datasets differ in one example that is there or is
not; the bounds hold whichever of the two a run was made on. Nothing here imports torch.

Three accountants, all of them Opacus':

* ``"prv"`` (the default): an upper bound by numerical composition, tight to about 1 % of epsilon.
* ``"rdp"``: an upper bound by Rényi divergences; 5 to 20 % looser, instant, and without numerical limits.
* ``"gdp"``: an approximation by the central limit theorem, not a bound: the truth may be higher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from robust_train.privacy import _accountants
from robust_train.privacy._search import largest

Segment: TypeAlias = tuple[float, float, int]

ACCOUNTANTS = {"prv": "upper bound", "rdp": "upper bound", "gdp": "approximation"}
STEP_LIMIT = 1_000_000  # more steps than this are never promised at once
TOLERANCE = 1e-3  # of the target, that calibrated noise may leave unspent
LARGEST_NOISE = 1e6

# RDP is above PRV, GDP as a rule below it: where they say that a budget ends, the search with PRV begins.
_INSTANT = ("rdp", "gdp")


class AccountingError(ValueError):
    """The accountant cannot tell epsilon here; the message says why, and what to do instead."""


# --- epsilon ------------------------------------------------------------------------------------------------------


def epsilon(history: Sequence[Segment], delta: float, accountant: str = "prv") -> float:
    """The privacy loss of a history.

    Args:
        history: segments ``(noise_multiplier, sample_rate, steps)``, of one run or of several on the same data.
        delta: probability that the loss is larger, in (0, 1).
        accountant: ``"prv"``, ``"rdp"`` or ``"gdp"``.

    Returns:
        Epsilon >= 0; 0.0 for a history without steps, ``inf`` where a step had no noise.

    Raises:
        ValueError: a value is out of range.
        AccountingError: the accountant's numerics end here. There is no silent change to another accountant.

    Guarantees:
        With ``"prv"`` and ``"rdp"``, the result is at least the true epsilon of the history. PRV exceeds it by
        about 1 %, but by 0.002 at least and (up to epsilon 10) 0.01 at most, above that by 0.1 %; and by what delta's
        allowance for rounding costs, which is little where ``steps <= 1e13 * delta``. The order of the segments does
        not matter.

    Reference:
        Gopi, Lee & Wutschitz, "Numerical Composition of Differential Privacy", 2021 (PRV); Mironov, Talwar & Zhang,
        "Rényi Differential Privacy of the Sampled Gaussian Mechanism", 2019 (RDP); Dong, Roth & Su, "Gaussian
        Differential Privacy", 2022 (GDP).
    """
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, got {accountant!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    found = merge(history)
    if not found:
        return 0.0
    if any(noise == 0 for noise, _, _ in found):
        return math.inf
    try:
        return {"prv": _accountants.prv, "rdp": _accountants.rdp, "gdp": _accountants.gdp}[accountant](
            found, float(delta)
        )
    except ArithmeticError as error:
        cure = "noise_multiplier is far too small for privacy" if accountant == "rdp" else 'use accountant="rdp"'
        shown = ", ".join(f"{steps} steps at sigma {noise:.6g} and q {rate:.6g}" for noise, rate, steps in found[:3])
        more = f" and {len(found) - 3} more segments" if len(found) > 3 else ""
        raise AccountingError(
            f'accountant="{accountant}" cannot tell epsilon of {shown}{more} at delta {delta:.6g} ({error}); {cure}'
        ) from error


def merge(history: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same history with one segment for each pair of noise and sampling rate, and none without steps.

    Raises:
        ValueError: a segment is not ``(noise_multiplier >= 0, 0 < sample_rate <= 1, whole steps >= 0)``.
    """
    total: dict[tuple[float, float], int] = {}
    for segment in history:
        if len(segment) != 3:
            raise ValueError(f"a segment of the history must be (noise_multiplier, sample_rate, steps), got {segment}")
        noise, rate, steps = segment
        if not (0 <= noise < math.inf and 0 < rate <= 1 and steps >= 0 and int(steps) == steps):
            raise ValueError(
                "a segment of the history must be (noise_multiplier >= 0, 0 < sample_rate <= 1, steps >= 0), "
                f"got {tuple(segment)}"
            )
        if steps:
            key = (float(noise), float(rate))
            total[key] = total.get(key, 0) + int(steps)
    return tuple((noise, rate, steps) for (noise, rate), steps in sorted(total.items()))


def prefix(history: Sequence[Segment], steps: int) -> list[Segment]:
    """The first ``steps`` steps of a history, or all of it where it has fewer."""
    found: list[Segment] = []
    for noise, rate, n in history:
        if steps <= 0:
            break
        found.append((noise, rate, min(n, steps)))
        steps -= n
    return found


# --- planning -----------------------------------------------------------------------------------------------------


def segments(
    noise_multiplier: float,
    sample_rate: float,
    from_step: int,
    to_step: int,
    noise_schedule: Sequence[float] = (1.0,),
    planned_steps: int | None = None,
) -> list[Segment]:
    """The history that steps ``from_step`` up to, but not including, ``to_step`` of a run make.

    Args:
        noise_multiplier: that of the run, >= 0.
        sample_rate: in (0, 1].
        from_step: first step, >= 0.
        to_step: the step after the last, >= ``from_step``.
        noise_schedule: factors on the noise multiplier for equal parts of the planned run, all > 0; the last holds
            beyond it.
        planned_steps: length of the planned run; needed where there are several factors.

    Raises:
        ValueError: a value is out of range.
    """
    factors = tuple(noise_schedule)
    if not factors or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"noise_schedule must hold factors > 0, got {noise_schedule}")
    if not 0 <= from_step <= to_step:
        raise ValueError(f"steps must run from 0 or more to as much or more, got {from_step} to {to_step}")
    if len(factors) > 1 and not planned_steps:
        raise ValueError("a noise_schedule of several factors needs the number of planned steps")
    ends = [math.ceil((i + 1) * (planned_steps or 0) / len(factors)) for i in range(len(factors) - 1)]
    found: list[Segment] = []
    for start, end, factor in zip([0, *ends], [*ends, to_step], factors, strict=True):
        steps = min(end, to_step) - max(start, from_step)
        if steps > 0:
            found.append((noise_multiplier * factor, sample_rate, steps))
    return found


def max_steps(
    target_epsilon: float,
    noise_multiplier: float,
    sample_rate: float,
    delta: float,
    accountant: str = "prv",
    spent: Sequence[Segment] = (),
    *,
    noise_schedule: Sequence[float] = (1.0,),
    planned_steps: int | None = None,
    from_step: int = 0,
) -> int:
    """How many more steps a budget allows.

    Args:
        target_epsilon: the budget, > 0.
        noise_multiplier: of the steps to come.
        sample_rate: of the steps to come.
        delta: as in :func:`epsilon`.
        accountant: as in :func:`epsilon`.
        spent: what was spent on the same data before.
        noise_schedule: as in :func:`segments`.
        planned_steps: as in :func:`segments`.
        from_step: how many steps of the plan lie behind, all of them in ``spent``.

    Returns:
        The number of steps, 0 where none fits, at most ``STEP_LIMIT``.

    Raises:
        ValueError: a value is out of range.

    Guarantees:
        For the returned n > 0, :func:`epsilon` of ``spent`` and n steps is at most the target, to the last digit; that
        of n + 1 steps (unless n is the limit) is above it, or beyond what the accountant can tell. The true loss of
        fewer steps is no larger than that of n, and so within the target too; the number reported for them was smaller
        in everything that was tried, which floating-point arithmetic does not prove.
    """
    _check_target(target_epsilon)
    history = list(spent)

    def cost(n: float) -> float:
        steps = segments(noise_multiplier, sample_rate, from_step, from_step + int(n), noise_schedule, planned_steps)
        try:
            return epsilon([*history, *steps], delta, accountant)
        except AccountingError:
            return math.inf

    if cost(0) > target_epsilon:
        return 0
    guess = 1
    if accountant == "prv":
        schedule = {"noise_schedule": noise_schedule, "planned_steps": planned_steps, "from_step": from_step}
        guess = max(
            max_steps(target_epsilon, noise_multiplier, sample_rate, delta, instant, history, **schedule)
            for instant in _INSTANT
        )
    return int(
        largest(
            cost,
            target_epsilon,
            aim=target_epsilon,
            guess=max(1, guess),
            between=(0, STEP_LIMIT + 1),
            settled=lambda fits, over: over[0] - fits[0] <= 1,
            whole=True,
        )
    )


def calibrate(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    spent: Sequence[Segment] = (),
    noise_schedule: Sequence[float] = (1.0,),
    *,
    guess: float | None = None,
) -> float:
    """The smallest noise multiplier that keeps ``steps`` more steps within a budget.

    Args:
        target_epsilon: the budget, > 0.
        delta: as in :func:`epsilon`.
        sample_rate: of the steps to come.
        steps: how many there will be, > 0.
        accountant: as in :func:`epsilon`.
        spent: what was spent on the same data before.
        noise_schedule: factors on the noise multiplier for equal parts of the run, as in :func:`segments`.
        guess: where to begin to search; the result hardly depends on it, the time does.

    Returns:
        The noise multiplier.

    Raises:
        ValueError: a value is out of range, or no amount of noise keeps to the budget.
        AccountingError: the accountant cannot tell epsilon of such a run.

    Guarantees:
        :func:`epsilon` of ``spent`` and the run is at most the target, and at least 99.9 % of it, or else a noise
        multiplier smaller by a hundred-thousandth exceeds the target or what the accountant can tell. With PRV this
        takes 3 to 6 calls of :func:`epsilon`: about a second for 1,000 steps, ten for 100,000.
    """
    _check_target(target_epsilon)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    history = list(spent)
    if (already := epsilon(history, delta, accountant)) >= target_epsilon:
        raise ValueError(f"target_epsilon={target_epsilon:g} is spent already: the history has epsilon {already:.6g}")

    def cost(noise: float) -> float:
        run = segments(noise, sample_rate, 0, steps, noise_schedule, steps)
        return epsilon([*history, *run], delta, accountant)

    failures: list[AccountingError] = []

    def cost_of_inverse(x: float) -> float:
        try:
            return cost(1 / x)
        except AccountingError as error:
            failures.append(error)
            return math.inf

    if guess is None:
        guess = 1.0
        if accountant == "prv":
            args = (target_epsilon, delta, sample_rate, steps)
            guess = min(calibrate(*args, instant, history, noise_schedule) for instant in _INSTANT)
    enough, least = target_epsilon * (1 - TOLERANCE), 1 / LARGEST_NOISE
    x = largest(
        cost_of_inverse,
        target_epsilon,
        aim=target_epsilon * (1 - TOLERANCE / 2),
        guess=1 / guess,
        between=(least, math.inf),
        settled=lambda fits, over: fits[1] >= enough or over[0] <= fits[0] * (1 + 1e-5),
    )
    if x > least:
        return 1 / x
    if failures:
        raise failures[-1]
    raise ValueError(f"target_epsilon={target_epsilon:g} cannot be reached: no amount of noise brings epsilon below it")


def _check_target(target_epsilon: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon must be > 0 and finite, got {target_epsilon}")
