"""Epsilon of a merged history whose steps all have noise, by each accountant.

Each raises ArithmeticError with the reason in words where its numerics end.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias

from robust_train.privacy import _opacus

History: TypeAlias = tuple[tuple[float, float, int], ...]

# PRV adds densities in double precision. Errors of up to 1.4 times steps * 2**-52 in delta were measured against the
# Gaussian mechanism's closed form; an allowance of 4 is taken off delta beforehand, of which it may be a quarter.
_ROUNDING = 4 * 2.0**-52
_LARGEST_GRID = 2**23  # points: a few seconds, less than 1 GB


@lru_cache(maxsize=512)
def prv(history: History, delta: float) -> float:
    """Upper bound by numerical composition."""
    steps = sum(n for _, _, n in history)
    rounding = _ROUNDING * steps
    if rounding > delta / 4:
        raise ArithmeticError(f"so many steps lose a delta below {4 * rounding:.2g} to rounding")
    loose = rdp(history, delta)
    error = min(max(0.01 * loose, 0.002), 0.01) if loose <= 10 else 0.001 * loose
    # The grid that Opacus is about to make: wide enough for the tail of delta, fine enough for the error.
    tail = delta / 1000
    reach = max(rdp(history, tail / 4), *(rdp(((s, q, 1),), tail / (8 * steps)) for s, q, _ in history)) + 3
    points = 2 * reach / error * math.sqrt(steps * math.log(12 / tail) / 2)
    if points > _LARGEST_GRID:
        raise ArithmeticError(f"it would take a grid of {points:.1g} points")
    value = _opacus.prv_epsilon(history, delta - rounding, error)
    if value > loose + 2 * error + 0.01 * loose:  # two upper bounds, of which this is the tight one
        raise ArithmeticError(f"{value:.6g} is above the looser bound {loose:.6g}")
    return max(0.0, value)


def rdp(history: History, delta: float) -> float:
    """Upper bound by Rényi divergences, at no cost once a pair of noise and sampling rate was seen."""
    total = [0.0] * len(_opacus.ORDERS)
    for noise, rate, steps in history:
        total = [t + steps * c for t, c in zip(total, _opacus.rdp_curve(noise, rate), strict=True)]
    value = _opacus.rdp_epsilon(total, delta)
    if not math.isfinite(value):
        raise ArithmeticError(f"the result is {value}")
    return max(0.0, value)


def gdp(history: History, delta: float) -> float:
    """Approximation by the central limit theorem; Opacus' class for it takes one segment only."""
    mu = math.hypot(*(_opacus.gdp_mu(noise, rate, steps) for noise, rate, steps in history))
    if not math.isfinite(mu):
        raise ArithmeticError(f"the Gaussian limit's parameter is {mu}")
    return _opacus.gdp_epsilon(mu, delta)
