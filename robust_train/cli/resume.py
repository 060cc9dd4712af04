"""``robust-train resume DIR``: go on with a run that was interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from robust_train.cli.train import RESULT_FILE, keep_what_was_asked, train_and_judge
from robust_train.config import ConfigError
from robust_train.explain import in_one_line


def resume(argv: list[str]) -> None:
    """The command.

    The run's own configuration is used. What it was allowed to name has to be allowed again, since a folder may come
    from a stranger.
    """
    parser = argparse.ArgumentParser(
        "robust-train resume", description="Go on with a run that was interrupted, from its newest checkpoint."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the run's folder, or that of one job of a sweep")
    parser.add_argument("--allow", nargs="+", default=[], metavar="PACKAGE", help="packages of yours that it may name")
    asked = parser.parse_args(argv)
    folder: Path = asked.folder
    kept = folder / ".hydra"
    if not (kept / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no .hydra/config.yaml")
    if (folder / RESULT_FILE).is_file():
        print(f"{folder} is finished: {RESULT_FILE} is there.")
        return
    try:
        cfg: Any = OmegaConf.load(kept / "config.yaml")
        recipe = OmegaConf.load(kept / "hydra.yaml").hydra.runtime.choices.get("recipe") or "no_recipe"
        overrides = list(OmegaConf.load(kept / "overrides.yaml"))
    except Exception as error:
        raise ConfigError(f"{kept}: cannot be read: {in_one_line(error)}") from error
    keep_what_was_asked(cfg, overrides)
    named = [str(name) for name in cfg.get("allow") or []]
    if missing := [name for name in named if name not in asked.allow]:
        raise ConfigError(
            f"{folder} names classes of {', '.join(missing)}; if you trust them, add --allow {missing[0]}"
        )
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd())
    train_and_judge(cfg, folder.resolve(), recipe, overrides=overrides, resume=True)
