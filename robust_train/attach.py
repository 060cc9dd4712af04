"""Callbacks for a script that nobody edits: ``ROBUST_TRAIN="recipe=pgd_at threat.eps=4/255" python train.py``.

Both Lightning packages ask the entry points of their group ``callbacks_factory`` for callbacks whenever a Trainer is
made. Ours answers with the recipe's, and with none unless the environment variable is set.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTING = "ROBUST_TRAIN"
TAKEN = "ROBUST_TRAIN_TAKEN"  # path of a file that is made once a Trainer was given the callbacks


def callbacks() -> list[Any]:
    """The callbacks of the recipe that ``ROBUST_TRAIN`` names; none if it is not set.

    Trainers that our own callbacks make for probes drop them again.

    Raises:
        SystemExit: the recipe cannot be built: the script ends before it trains anything undefended. With
            ``HYDRA_FULL_ERROR=1`` the error itself is raised.
    """
    text = os.environ.get(SETTING, "").strip()
    if not text:
        return []
    from robust_train.config import ConfigError, recipe
    from robust_train.explain import shortened

    try:
        name, overrides, allow = parsed(shlex.split(text))
        made = recipe(name, *overrides, allow=allow)
    except ValueError as error:  # a ConfigError is one; so is an open quote
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
            raise
        said = error if isinstance(error, ConfigError) else f"{text!r}: {error}"
        sys.exit(f"robust-train: {SETTING}: {shortened(' '.join(str(said).split()))}")
    if (note := os.environ.get(TAKEN)) is not None:
        Path(note).touch()
    return made


def parsed(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The recipe's name, its overrides, and the packages of yours that it may name, from ``recipe=… KEY=VALUE …``.

    Raises:
        ConfigError: no recipe is named, or more than one.
    """
    from robust_train.config import ConfigError

    named = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    if len(named) != 1 or not named[0]:
        raise ConfigError(f'name one recipe, as in "recipe=pgd_at threat.eps=4/255", got {" ".join(words)!r}')
    allow: list[str] = []
    overrides: list[str] = []
    for word in words:
        if word.startswith("allow="):
            allow += [part for part in re.split(r"[\[\],\s]+", word.partition("=")[2]) if part]
        elif not word.startswith("recipe="):
            overrides.append(word)
    return named[0], overrides, allow
