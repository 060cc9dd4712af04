"""Global random state, set aside and put back: attacks must not change what the user's program draws next."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_global_rng(device: torch.device, numpy: bool = True) -> dict[str, Any]:
    """State of the global generators of Python, numpy (by far the slowest) and torch (CPU and ``device``)."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy:
        state["numpy"] = np.random.get_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_global_rng(state: dict[str, Any], device: torch.device, numpy: bool = True) -> None:
    """Put back what ``get_global_rng`` returned; numpy's may be left out."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if numpy and "numpy" in state:
        np.random.set_state(state["numpy"])


def seed_global_rng(seed: int) -> None:
    """Start the global generators of Python, numpy and torch, on every device, from ``seed`` in [0, 2**63)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def numpy_moved(state: dict[str, Any]) -> bool:
    """Whether numpy's global generator is elsewhere than in ``state``."""
    (_, keys, *rest), (_, now, *rest_now) = state["numpy"], np.random.get_state()
    return rest != rest_now or not np.array_equal(keys, now)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the global generators are as before afterwards, also after an exception."""
    state = get_global_rng(device)
    try:
        yield
    finally:
        set_global_rng(state, device)


def generator_for(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator whose stream depends on ``parts`` alone, for example (seed, rank, epoch, batch)."""
    seed = random.Random("/".join(map(str, parts))).getrandbits(63)  # noqa: S311  (not for secrets)
    return torch.Generator(device).manual_seed(seed)
