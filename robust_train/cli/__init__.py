"""The command ``robust-train``: what it can do, and which part does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

from robust_train.attach import SETTING
from robust_train.config import ConfigError
from robust_train.explain import in_one_line, shortened

INTERRUPTED = 130  # what shells use for Ctrl-C

COMMANDS = {  # by name: where it is, and what it does
    "train": ("train", "train with a recipe, judge the result, show what it bought (also without the word train)"),
    "evaluate": ("evaluate", "judge a checkpoint: ckpt=FILE attack=pgd"),
    "certify": ("certify", "what is proved of a checkpoint: certify ckpt=FILE sigma=0.25, or method=ibp"),
    "audit": ("audit", "who was in the training data, as far as a checkpoint tells: audit ckpt=FILE"),
    "resume": ("resume", "go on with a run that was interrupted: resume DIR"),
    "run": ("script", "harden a script of yours without an edit: run recipe=pgd_at -- python train.py"),
    "recipes": ("recipes", "the recipes; recipes show NAME: what one consists of"),
    "sweep-table": ("sweep", "the jobs of a sweep in one table: sweep-table DIR"),
    "privacy": ("rooms", "privacy plan: how much noise a privacy budget takes"),
    "manifest": ("rooms", "what the training data were: a digest of every row"),
    "verify": ("rooms", "whether the training data still are what a manifest says"),
    "quarantine": ("rooms", "rows that were left out of training: list, restore, export"),
}


def main() -> None:
    """Entry point. What goes wrong is one line on stderr and exit status 1; HYDRA_FULL_ERROR=1 shows the trace."""
    argv = sys.argv[1:]
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("train", argv)
    try:
        if not argv or argv[0] in ("--help", "-h"):
            from robust_train.cli.recipes import overview

            print(overview())
            return
        if name != "run" and os.environ.get(SETTING):
            raise ConfigError(f"{SETTING} is for scripts of yours, and would add its callbacks to ours: unset it")
        _command(name)(rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read along has seen enough; nor must Python's last flush fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if wants_trace():
            raise
        said = str(error) if isinstance(error, ConfigError) else in_one_line(error)
        sys.exit(f"robust-train: {shortened(' '.join(said.split()))}")


def wants_trace() -> bool:
    """Whether the user asked for the full trace of an error."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


def _command(name: str) -> Callable[[list[str]], None]:
    return getattr(import_module(f"robust_train.cli.{COMMANDS[name][0]}"), name.replace("-", "_"))
