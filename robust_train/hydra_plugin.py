"""Makes our configs visible to Hydra: ``conf/<group>/x.yaml``, and ``recipes/x.yaml`` as the group ``recipe``.

On a Hydra search path, ``robust-train://`` mounts them as they are (``recipe=pgd_at``, as our own command does), and
``robust-train://robust_train`` mounts them below ``robust_train/`` (``+robust_train/recipe=pgd_at``), where they cannot
collide with the groups of another app. Our own yaml files refer to one another by the second name only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

PACKAGE = Path(__file__).resolve().parent
MOUNTS = ("", "robust_train")
LONGEST = 120  # characters of a folder's name


def config_dir(name: str) -> Path:
    """Where the folder ``conf`` or ``recipes`` lies: inside an installed wheel, else at the top of the checkout.

    Args:
        name: ``"conf"`` or ``"recipes"``.

    Returns:
        The folder's path; it may not exist.
    """
    packaged = PACKAGE / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def slug(overrides: Sequence[str]) -> str:
    """A folder's name for a job of a sweep, the same whatever the order of its overrides.

    Names that had to be changed or cut end in a digest, so that no two jobs share one.
    """
    names = sorted(map(str, overrides), key=lambda override: ("." in override.partition("=")[0], override))
    text = ",".join(names) or "defaults"  # choices first, such as the recipe
    short = re.sub(r"[^\w.,=+-]+", "_", text)[:LONGEST]
    return short if short == text else f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


OmegaConf.register_new_resolver("robust_train.slug", slug, replace=True)


class RobustTrainSearchPath(SearchPathPlugin):
    """Our configs below ``robust_train/`` on the search path of every Hydra app of the environment."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the mount behind the app's own configs."""
        search_path.append("robust-train", "robust-train://robust_train")


def register() -> None:
    """Make Hydra know ``robust-train://`` also where the package is not installed, as in a bare checkout.

    Calling it again, or after Hydra has found the source by itself, changes nothing.
    """
    Plugins.instance().register(RobustTrainConfigs)
    Plugins.instance().register(RobustTrainSearchPath)


class RobustTrainConfigs(ConfigSource):
    """The config source ``robust-train://MOUNT``, where MOUNT is empty or ``robust_train``."""

    @staticmethod
    def scheme() -> str:
        """The name before ``://``."""
        return "robust-train"

    def available(self) -> bool:
        """True when the mount is one of ours and the configs are on disk."""
        return self.path in MOUNTS and config_dir("conf").is_dir()

    def is_group(self, config_path: str) -> bool:
        """True for a folder of configs, the mount itself and what lies above it."""
        path = self._on_disk(config_path)
        return not config_path if path is None else path.is_dir()

    def is_config(self, config_path: str) -> bool:
        """True for a config file, named with or without ``.yaml``."""
        path = self._on_disk(self._normalize_file_name(config_path))
        return path is not None and path.is_file()

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one config and the ``# @package`` line at its top.

        Raises:
            ConfigLoadError: there is no such config.
        """
        path = self._on_disk(self._normalize_file_name(config_path))
        if path is None or not path.is_file():
            raise ConfigLoadError(f"Config not found: {config_path}")
        header = self._get_header_dict(path.read_text(encoding="utf-8"))
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.load(path),
            header=header,
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The sorted names of the groups and configs directly below ``config_path``."""
        folder = self._on_disk(config_path)
        if folder is None:  # above the mount, which is all that can be seen from there
            return [self.path] if not config_path and results_filter is not ObjectType.CONFIG else []
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if config_path.strip("/") == self.path and config_dir("recipes").is_dir():
            names.add("recipe")
        found: list[str] = []
        for name in names:
            self._list_add_result(found, f"{config_path}/{name}".lstrip("/"), name, results_filter)
        return sorted(set(found))

    def _on_disk(self, config_path: str) -> Path | None:
        """Where ``config_path`` would lie on disk, or None when it is not below the mount."""
        path = config_path.strip("/")
        if self.path:
            if f"{path}/".startswith(f"{self.path}/"):
                path = path[len(self.path) + 1 :]
            else:
                return None
        group, _, rest = path.partition("/")
        return config_dir("recipes") / rest if group == "recipe" else config_dir("conf") / path
