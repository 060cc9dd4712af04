"""``robust-train run recipe=… -- python train.py``: a script hardened without an edit."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from robust_train.attach import SETTING, TAKEN, parsed
from robust_train.config import ConfigError, recipe_config

USAGE = """usage: robust-train run recipe=NAME [KEY=VALUE ...] [allow=[PACKAGE]] -- COMMAND [ARGUMENT ...]

Run a command with a recipe's callbacks added to every Lightning Trainer that it makes, as
ROBUST_TRAIN="recipe=NAME ..." COMMAND does. Here the recipe is checked before the command starts, and it is an error if
the command ends without having made a Trainer: then nothing was hardened."""


def run(argv: list[str]) -> None:
    """The command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if "--" not in argv or not (command := argv[argv.index("--") + 1 :]):
        raise ConfigError("run: write -- before the command, as in: robust-train run recipe=pgd_at -- python train.py")
    words = argv[: argv.index("--")]
    name, overrides, _ = parsed(words)
    recipe_config(name, *overrides)
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "taken"
        environment = {**os.environ, SETTING: shlex.join(words), TAKEN: str(taken)}
        try:
            status = subprocess.run(command, env=environment).returncode  # noqa: S603  (the user's own command)
        except OSError as error:
            raise ConfigError(f"run: cannot start {command[0]!r}: {error.strerror}") from error
        if status == 0 and not taken.exists():
            raise ConfigError(
                f"run: {command[0]} made no Lightning Trainer in an environment where robust-train is installed, so "
                "nothing was hardened"
            )
    sys.exit(status if status >= 0 else 128 - status)
