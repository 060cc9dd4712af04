"""Opacus' privacy accountants, loaded without the rest of Opacus.

Importing ``opacus`` brings in torch and every layer and optimizer it has, which takes seconds; its accountants need
numpy and scipy alone. They import one thing from elsewhere, ``DPOptimizer``, and only to annotate a method that is not
used here. So, unless Opacus is imported already, its package and its optimizers are stood in for by empty modules while
the accountants load. Then all of Opacus is taken out of ``sys.modules`` again: what is loaded here stays usable, and a
later ``import opacus`` is the genuine one, as if nothing had happened.

No private attribute of Opacus is used: what follows calls its public accountant and the public functions of its
``analysis`` modules.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Opacus' own orders end at 63, where the bound for a small epsilon comes from higher ones.
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 72, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1000)

_loading = threading.Lock()


@lru_cache(maxsize=1)
def accountants() -> ModuleType:
    """The package ``opacus.accountants``: Opacus' own where it is imported already, else a copy without torch."""
    with _loading:
        return import_module("opacus.accountants") if "opacus" in sys.modules else _load_alone()


def _load_alone() -> ModuleType:
    spec = find_spec("opacus")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("opacus is not installed; privacy accounting needs it: pip install opacus")
    package, optimizers = ModuleType("opacus"), ModuleType("opacus.optimizers")
    package.__path__ = list(spec.submodule_search_locations)
    optimizers.__dict__["DPOptimizer"] = object
    sys.modules.update({"opacus": package, "opacus.optimizers": optimizers})
    try:
        return import_module("opacus.accountants")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
            del sys.modules[name]


def _analysis(name: str) -> Any:
    """``opacus.accountants.analysis.rdp`` or ``.gdp``, of whichever copy was loaded."""
    return getattr(accountants(), name).privacy_analysis


@contextmanager
def _quiet() -> Iterator[None]:
    """Numerics that are expected: logarithms of zero at a sample rate of 1, and orders at the end of the range."""
    import numpy as np
    from scipy.integrate import IntegrationWarning

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)  # looser, still a bound
        warnings.filterwarnings("error", category=IntegrationWarning)  # a wrong mean would be multiplied by the steps
        yield


def prv_epsilon(history: Sequence[tuple[float, float, int]], delta: float, error: float) -> float:
    """Upper bound on epsilon by numerical composition of privacy-loss random variables.

    Args:
        history: ``(noise_multiplier, sample_rate, steps)``, all > 0.
        delta: in (0, 1).
        error: how far the bound may lie above the truth.

    Raises:
        ArithmeticError: the computation failed or left the range of floating-point numbers; its text says why.
    """
    accountant = accountants().PRVAccountant()
    accountant.history = list(history)
    try:
        with _quiet():
            value = float(accountant.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, ArithmeticError, Warning) as failure:
        raise ArithmeticError(" ".join(str(failure).split())[:200]) from failure
    if not math.isfinite(value):
        raise ArithmeticError(f"the result is {value}")
    return value


@lru_cache(maxsize=256)
def rdp_curve(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    """Rényi divergence of one step at each of ``ORDERS``; that of several steps is the sum."""
    try:
        with _quiet():
            curve = _analysis("rdp").compute_rdp(
                q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS)
            )
    except ValueError as failure:  # a logarithm of what rounding made negative
        raise ArithmeticError(" ".join(str(failure).split())[:200]) from failure
    return tuple(max(0.0, float(value)) for value in curve)  # a divergence near zero may come out below it


def rdp_epsilon(curve: Sequence[float], delta: float) -> float:
    """Upper bound on epsilon from a Rényi curve at ``ORDERS``."""
    with _quiet():
        return float(_analysis("rdp").get_privacy_spent(orders=list(ORDERS), rdp=list(curve), delta=delta)[0])


def gdp_mu(noise_multiplier: float, sample_rate: float, steps: int) -> float:
    """Parameter of the Gaussian mechanism that many steps tend to, by the central limit theorem."""
    with _quiet():
        return float(
            _analysis("gdp").compute_mu_poisson(steps=steps, noise_multiplier=noise_multiplier, sample_rate=sample_rate)
        )


def gdp_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism.

    Raises:
        ArithmeticError: it is above 500, where Opacus does not look for it.
    """
    try:
        with _quiet():
            if _analysis("gdp").delta_eps_mu(eps=0.0, mu=mu) <= delta:
                return 0.0
            return float(_analysis("gdp").eps_from_mu(mu=mu, delta=delta))
    except (ValueError, ArithmeticError) as failure:
        raise ArithmeticError("it is above 500") from failure
