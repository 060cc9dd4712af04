"""Folders of configs that the user brings with ``--config-dir``: what files in them may decide, and what not.

A recipe may come from a stranger. What it builds is vetted by ``robust_train.config.build``; but Hydra has settings of
its own below ``hydra``, some of which name Python code, or environment variables, and take effect before a job begins.
Those, and which packages are trusted, are for the command line alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from robust_train.config import ConfigError
from robust_train.hydra_plugin import RobustTrainConfigs, config_dir

TYPED = ("hydra", "allow")  # what only the command line may set
REFUSED = ("--config-p", "-cp", "--config-n", "-cn", "hydra.searchpath")  # argparse takes shortened flags, too


def without_folders(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without ``--config-dir``, and the folders that it named.

    Raises:
        ConfigError: there is no such folder, or an option brings configs in another way.
    """
    rest: list[str] = []
    folders: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--config-d") or flag == "-cd":
            folder = value if equals else next(words, "")
            if not folder or not os.path.isdir(folder):
                raise ConfigError(f"{flag}: there is no folder {folder!r}")
            folders.append(os.path.abspath(folder))
        elif flag.lstrip("+~").startswith(REFUSED):
            raise ConfigError(f"{flag}: use --config-dir FOLDER, whose configs are added to ours")
        else:
            rest.append(word)
    return rest, folders


class CommandLineSearchPath(SearchPathPlugin):
    """Our configs without a prefix, and the user's, on the search path of our own command line; other apps see neither.

    Attributes:
        folders: the user's; None: whatever is composed is not for our command line.
    """

    folders: Sequence[str] | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the mount, then the folders: a name of ours means ours."""
        if self.folders is None:
            return
        search_path.append("robust-train", "robust-train://")
        for folder in self.folders:
            search_path.append("command-line", f"{UserConfigs.scheme()}://{folder}")


@contextmanager
def searched(folders: Sequence[str] = ()) -> Iterator[None]:
    """What is composed inside sees our configs without a prefix, and those of the folders."""
    before, CommandLineSearchPath.folders = CommandLineSearchPath.folders, folders
    try:
        yield
    finally:
        CommandLineSearchPath.folders = before


class UserConfigs(RobustTrainConfigs):
    """The config source ``robust-train-folder://FOLDER``."""

    @staticmethod
    def scheme() -> str:
        """The name before ``://``."""
        return "robust-train-folder"

    def available(self) -> bool:
        """True when the folder is there."""
        return Path(self.path).is_dir()

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one config.

        Raises:
            ConfigError: it sets what only the command line may set.
            ConfigLoadError: there is no such config.
        """
        result = super().load_config(config_path)
        if (found := reserved(config_path.removesuffix(".yaml"), result)) is not None:
            raise ConfigError(
                f"{Path(self.path) / config_path}: a config in a folder cannot set {found}, which decides what code "
                "runs; if you want that, type it on the command line"
            )
        return result

    def _on_disk(self, config_path: str) -> Path | None:
        return Path(self.path) / config_path.strip("/")


def reserved(config_path: str, result: ConfigResult) -> str | None:
    """What a config would set that is for the command line alone, or None.

    Args:
        config_path: its group and name, such as ``recipe/mine``.
        result: what is in it.
    """
    group, _, name = config_path.strip("/").rpartition("/")
    if group.partition("/")[0] == "hydra":  # chosen by a word on the command line, unless ours or a plugin's is meant
        return f"{group}/{name}" if _taken(group, name) else None
    package = str(result.header.get("package") or "")
    package = package.replace("_group_", group.replace("/", ".")).replace("_name_", name)
    keys = [str(key) for key in result.config] if isinstance(result.config, DictConfig) else []
    parts = re.split(r"[^\w$-]+", str(result.config._get_node("defaults"))) if "defaults" in keys else []
    return next((part for part in (*package.split("."), *keys, *parts) if part.partition(".")[0] in TYPED), None)


def _taken(group: str, name: str) -> bool:
    """Whether a plugin has a config of this name, or a config of ours builds on one."""
    bases = [OmegaConf.to_container(OmegaConf.load(path)) for path in (config_dir("conf") / group).glob("*.yaml")]
    if any(name in base.get("defaults", []) for base in bases):  # type: ignore[union-attr]
        return True
    try:
        ConfigStore.instance().load(f"{group}/{name}.yaml")
    except ConfigLoadError:
        return False
    return True
