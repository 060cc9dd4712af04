"""Where a rising function that is slow to compute crosses a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

Point: TypeAlias = tuple[float, float]  # an argument and its cost


def largest(
    cost: Callable[[float], float],
    target: float,
    *,
    aim: float,
    guess: float,
    between: tuple[float, float],
    settled: Callable[[Point, Point], bool],
    whole: bool = False,
) -> float:
    """The largest argument at which a rising function is at most ``target``, in few calls.

    Costs here are close to powers of the argument, so the next argument is where the power law through the last two
    points meets the target, as long as that lies between what fits and what does not.

    Args:
        cost: the function; ``inf`` where it has no value.
        target: what it may reach.
        aim: what is good enough, at most ``target``; where the next argument is sought.
        guess: where to begin.
        between: open interval of the arguments; its lower end is taken to fit, its upper end not to.
        settled: whether the largest argument that fits and the smallest that does not are close enough.
        whole: try whole numbers only.

    Returns:
        An argument that was tried and fits, or the lower end where none did.
    """
    floor, limit = between
    fits, over, before = (floor, 0.0), (limit, math.inf), None
    x, tries = guess, 0
    while tries < 200 and not settled(fits, over):
        if whole:
            x = min(max(math.floor(x), fits[0] + 1), over[0] - 1)
        elif x <= floor:
            break
        here, tries = (x, cost(x)), tries + 1
        if here[1] <= target:
            fits = here
        else:
            over = here
        stride = _stride(before, here, aim)
        if fits[0] > floor and over[0] < limit:
            x *= math.exp(min(max(stride, -4.0), 4.0))
            if not fits[0] < x < over[0] or tries % 8 == 0:
                x = math.sqrt(fits[0] * over[0])
        else:
            if stride * (1 if here is fits else -1) <= 0:  # no law to go by: ever longer strides
                stride = tries * math.log(aim / min(max(here[1], aim / 64), 64 * aim))
            x *= math.exp(min(max(1.1 * stride, -4.0), 4.0))  # rather too far than not far enough
        before = here
    return fits[0]


def _stride(before: Point | None, here: Point, aim: float) -> float:
    """Logarithm of the factor from ``here`` to where the power law through two points meets ``aim``; or else 0."""
    if before is None or not (0 < before[1] < math.inf and 0 < here[1] < math.inf) or before[1] == here[1]:
        return 0.0
    return math.log(aim / here[1]) * math.log(here[0] / before[0]) / math.log(here[1] / before[1])
