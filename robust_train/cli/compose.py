"""Hydra as our command line uses it: where the configs are, and how a job's errors reach the user."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robust_train.cli import wants_trace
from robust_train.cli.folders import CommandLineSearchPath, UserConfigs, searched, without_folders
from robust_train.config import ConfigError
from robust_train.explain import dotted_keys, explained, in_one_line, not_an_override
from robust_train.hydra_plugin import config_dir, register

ERROR_FILE = "error.txt"
TRACE = "HYDRA_FULL_ERROR"  # makes Hydra raise what went wrong; it would print a trace and leave otherwise
Job = Callable[[DictConfig, Path], Any]


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """A config of ours with some overrides.

    Raises:
        ConfigError: an override does not fit.
    """
    _see_everything()
    try:
        with searched(), initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explained(error, lambda: _keys(name, overrides))) from error


def launch(name: str, job: Job, argv: list[str]) -> None:
    """Compose a config of ours from the command line and do the job, or, with ``-m``, many.

    Args:
        name: of the config: ``conf/<name>.yaml``.
        job: is given the config and the run's folder; what it returns is for Hydra's sweepers.
        argv: flags and overrides.

    Raises:
        ConfigError: the config cannot be composed.
        Exception: what the job raised; of several jobs the first that failed, when all are done. The trace is in the
            job's ``error.txt``.
    """
    _see_everything()
    words, folders = without_folders(argv)
    check_words(words)
    typed, trace = sys.argv, wants_trace()
    failed: list[Exception] = []

    def task(cfg: DictConfig) -> Any:
        try:
            with _as_typed(typed, trace):
                return _in_folder(cfg, job, trace)
        except Exception as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:  # the sweeper and the launcher have to know
                raise
            failed.append(error)
            return None

    sys.argv = [typed[0], *words]
    before = os.environ.get(TRACE)
    os.environ[TRACE] = "1"
    try:
        with searched(folders):
            hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explained(error, lambda: _keys(name, words, folders))) from error
    finally:
        sys.argv = typed
        os.environ.pop(TRACE)
        if before is not None:
            os.environ[TRACE] = before
    if failed:
        raise failed[0]


def check_words(words: Sequence[str]) -> None:
    """Refuse what Hydra itself would refuse without the key, or without a message.

    Raises:
        ConfigError: an override is not of the right form, or a choice such as ``data=3`` is no name.
    """
    for word in words:
        if "=" not in word.lstrip("=") and word[:1] not in ("=", "+", "~") or word.startswith("-"):
            continue  # a flag, or what belongs to one
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
        except HydraException as error:
            raise ConfigError(explained(error)) from error
        group = override.key_or_group
        if not group:
            raise ConfigError(not_an_override(word))
        if override.is_delete() or override.is_sweep_override() or not _is_group(group):
            continue
        value = override.value()
        names = value if isinstance(value, list) else [value]
        if not names or not all(
            isinstance(name, (str, QuotedString, dict)) and "${" not in str(name) for name in names
        ):
            raise ConfigError(
                f"{group}: must be the name of a config, got {value!r}; robust-train --help lists them, and ~{group} "
                "leaves it out"
            )


def typed_overrides() -> list[str]:
    """What was asked for, as it was typed; ``overrides.task`` itself would resolve interpolations in it."""
    return [str(word) for word in OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)]  # type: ignore[union-attr]


def _is_group(name: str) -> bool:
    return name == "recipe" or (config_dir("conf") / name).is_dir()


def _in_folder(cfg: DictConfig, job: Job, trace: bool) -> Any:
    """Do the job; of what goes wrong, leave a note in its folder."""
    settings = HydraConfig.get()
    note = Path(settings.runtime.output_dir) / ERROR_FILE
    try:
        value = job(cfg, note.parent)
    except Exception as error:
        said = in_one_line(error)
        note.write_text(f"{said}\n\n{''.join(traceback.format_exception(error))}", encoding="utf-8")
        if settings.mode is RunMode.MULTIRUN:
            where = " ".join(typed_overrides())
            print(f"robust-train: job {settings.job.num} failed ({where}): {said}", file=sys.stderr, flush=True)
        if trace or isinstance(error, ConfigError):
            raise
        raise ConfigError(said) from error  # which, unlike any other, a launcher can send from process to process
    note.unlink(missing_ok=True)
    return value


@contextmanager
def _as_typed(typed: list[str], trace: bool) -> Iterator[None]:
    """While a job runs, arguments and environment are the user's: Lightning starts processes with them."""
    hydras, setting = sys.argv, os.environ.get(TRACE)
    sys.argv = typed
    if not trace:
        os.environ.pop(TRACE, None)
    try:
        yield
    finally:
        sys.argv = hydras
        if setting is not None:
            os.environ[TRACE] = setting


def _see_everything() -> None:
    """Make our configs known to Hydra without a prefix, and the modules of the working directory to Python."""
    register()
    Plugins.instance().register(UserConfigs)
    Plugins.instance().register(CommandLineSearchPath)
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:  # as ``python -m`` would
        sys.path.insert(0, os.getcwd())


def _keys(name: str, overrides: Sequence[str], folders: Sequence[str] = ()) -> list[str]:
    """The settings that there are with the choices among these overrides, for hints."""
    choices = [o for o in overrides if o.count("=") == 1 and not set(o.partition("=")[0]) & set("-.@~")]
    for some in (choices, []):
        try:
            with searched(folders), initialize_config_dir(str(config_dir("conf")), version_base="1.3"):
                return dotted_keys(compose(name, overrides=some))
        except (HydraException, OmegaConfBaseException):
            continue
    return []
