"""``robust-train recipes`` and the overview: what there is, without torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from omegaconf import OmegaConf

from robust_train.cli import COMMANDS
from robust_train.config import recipe_config, recipe_names
from robust_train.hydra_plugin import config_dir


def recipes(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser("robust-train recipes", description="What recipes there are, and what is in one.")
    actions = parser.add_subparsers(dest="action")
    show = actions.add_parser("show", help="what a recipe defends against, and its composed yaml")
    show.add_argument("name")
    show.add_argument("overrides", nargs="*", help="such as threat.eps=4/255")
    asked = parser.parse_args(argv)
    if asked.action == "show":
        print(shown(asked.name, asked.overrides))
    else:
        print("\n".join(_listed()))


def shown(name: str, overrides: list[str]) -> str:
    """A recipe's description, what it defends against, and its composed yaml."""
    config = recipe_config(name, *overrides)
    about, against = described(name)
    return f"# {name}: {about}\n# Defends against: {against}\n{OmegaConf.to_yaml(config)}".rstrip()


def described(name: str) -> tuple[str, str]:
    """What a recipe does and what it defends against: the comments at its top."""
    text = (config_dir("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    lines = re.findall(r"^# (?!@)(.*)$", text.partition("defaults:")[0], re.MULTILINE)
    return lines[0], lines[1].removeprefix("Defends against: ").rstrip(".")


def overview() -> str:
    """What ``robust-train --help`` prints."""
    width = max(map(len, COMMANDS)) + 2
    commands = [f"  {name:{width}}{about}" for name, (_, about) in COMMANDS.items()]
    groups = {path.parent.name for path in config_dir("conf").glob("*/*.yaml")} - {"callback", "hydra"}
    choices = [f"  {group:{width}}{', '.join(_options(config_dir('conf') / group))}" for group in sorted(groups)]
    return "\n".join(
        [
            "robust-train: harden a Lightning training run, and measure what that bought.",
            "",
            "  robust-train recipe=pgd_at baseline=true       a hardened model beside its undefended twin",
            "  robust-train recipe=trades threat.eps=0.1      another method, another radius",
            "  robust-train -m recipe=pgd_at,trades seed=0,1  a sweep; the same line again runs what is missing",
            "  robust-train recipe=pgd_at --cfg job           every setting as it stands, nothing run",
            "  robust-train recipe=pgd_at --info defaults-tree   where they come from (more: --hydra-help)",
            "",
            "Commands (robust-train COMMAND --help says more):",
            *commands,
            "",
            "Recipes (recipe=NAME):",
            *_listed(),
            "",
            "Other choices (GROUP=NAME):",
            *choices,
            "",
            'Tab completion in bash: eval "$(robust-train -sc install=bash)"; zsh and fish alike.',
        ]
    )


def _listed() -> list[str]:
    width = max(map(len, recipe_names())) + 2
    return [f"  {name:{width}}{described(name)[0]}" for name in recipe_names()]


def _options(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))
