"""What the command line was told, looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from math import inf
from types import NoneType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robust_train.config import ConfigError
from robust_train.explain import dotted_keys, hint, in_one_line

NODES = ("model", "data", "trainer", "callbacks", "judge", "threat")
MISSING = "{0}: missing; name one, for example with recipe=… or {0}=…"
JUDGE = ("attacks", "limit_batches", "curve", "checks", "corruptions", "draws", "groups")
OF_CHECKPOINTS = ("shards", "examples")  # of evaluate alone
MOST_EXAMPLES = 4096
MOST = 2**31 - 1
TRAINER_COUNTS = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "num_nodes": 1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
TRAINER_SWITCHES = ("enable_progress_bar", "enable_model_summary", "detect_anomaly", "use_distributed_sampler")
TRAINER_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")
NOT_NULL = ("accumulate_grad_batches", "num_nodes")
TRAINER_NAMES = ("accelerator", "strategy", "precision", "gradient_clip_algorithm")
# what a sweeper can be told to optimize
METRICS = (
    "robust_acc",
    "clean_acc",
    "robust_loss",
    "clean_loss",
    "epsilon",
    "attack_success_rate",
    "verified_acc",
    "corruption_acc",
    "train_seconds",
)


def check_settings(cfg: DictConfig, nodes: Sequence[str] = NODES) -> None:
    """Refuse what no constructor will see, or see too late.

    Args:
        cfg: one of ours, such as ``conf/train.yaml``, composed.
        nodes: of it, those that are needed.

    Raises:
        ConfigError: a node is missing or no node, an interpolation leads nowhere, or a setting of the command's own is
            out of range.
    """
    for node in nodes:
        if cfg._get_node(node) is None:  # others may refer to it
            raise ConfigError(MISSING.format(node))
    task: Any = OmegaConf.to_container(cfg).get("task", {})  # type: ignore[union-attr]
    _check_task(task)
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {in_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{', '.join(_endless(cfg))}: refer to each other in a circle") from error
    _check_task(plain.get("task", {}))
    for node in nodes:
        if plain.get(node) is None:
            raise ConfigError(MISSING.format(node))
        if not isinstance(plain[node], dict):
            raise ConfigError(f"{node}: must be a group of settings, got {plain[node]!r}")
    if "trainer" in nodes:
        check_trainer(plain["trainer"])
    allow, ckpt, poison = plain.get("allow"), plain.get("ckpt"), plain.get("poison")
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise ConfigError(f"allow: must be a list of packages such as [my_pkg], got {allow!r}")
    if ckpt is not None and (not isinstance(ckpt, str) or not ckpt):
        raise ConfigError(f"ckpt: must be the path of a checkpoint, or null, got {ckpt!r}")
    if not isinstance(plain.get("baseline", False), bool):
        raise ConfigError(f"baseline: must be true or false, got {plain['baseline']!r}")
    check_seed(plain.get("seed"))
    if "judge" in nodes:
        _check_metrics(plain.get("optimize"))
        _check_judge(plain["judge"], JUDGE if "callbacks" in nodes else (*JUDGE, *OF_CHECKPOINTS))
    if "corruption_acc" in _names(plain.get("optimize")) and not plain["judge"].get("corruptions"):
        raise ConfigError("optimize: corruption_acc is measured with judge.corruptions=true")
    if poison is not None:
        if not isinstance(poison, dict):
            raise ConfigError(f"poison: must be a group of settings, got {poison!r}")
        if "classes" not in task:
            raise ConfigError("task.classes: missing; poisons need it")


def check_seed(seed: Any) -> None:
    """Refuse what seeds no generator.

    Raises:
        ConfigError: it does not.
    """
    if not _whole(seed, 0) or seed >= 2**32:
        raise ConfigError(f"seed: must be a whole number from 0 to {2**32 - 1}, got {seed!r}")


def check_kind(key: str, value: Any, name: str) -> None:
    """Refuse what is not of the class of this name in either Lightning package.

    Raises:
        ConfigError: it is not.
    """
    packages = ["pytorch_lightning"] + (["lightning.pytorch"] if find_spec("lightning") else [])
    if not isinstance(value, tuple(getattr(import_module(package), name) for package in packages)):
        raise ConfigError(f"{key}._target_: must name a Lightning {name}, got {value!r:.80}")


def check_trainer(settings: dict[str, Any]) -> None:
    """Refuse settings that the Trainer itself takes, and stumbles over when it has begun.

    Raises:
        ConfigError: one is out of range.
    """
    for name, least in TRAINER_COUNTS.items():
        value = settings.get(name)
        if name in settings and value is None and name in NOT_NULL:
            raise ConfigError(f"trainer.{name}: must be a whole number >= {least}, got None")
        if value is not None and (not _whole(value, least) or value > MOST):
            raise ConfigError(f"trainer.{name}: must be a whole number >= {least} and <= {MOST}, got {value!r}")
    for name in TRAINER_SWITCHES:
        if not isinstance(value := settings.get(name, False), (bool, NoneType)):
            raise ConfigError(f"trainer.{name}: must be true or false, got {value!r}")
    for name in TRAINER_NAMES:
        if not isinstance(value := settings.get(name, "auto"), (str, int, NoneType)) or isinstance(value, bool):
            raise ConfigError(f"trainer.{name}: must be a name, got {value!r}")
    for name in TRAINER_LIMITS:
        value = settings.get(name)
        share = isinstance(value, float) and 0 <= value <= 1
        if value is not None and not share and (not _whole(value, 0) or value > MOST):
            raise ConfigError(f"trainer.{name}: must be a number of batches, or a share from 0.0 to 1.0, got {value!r}")
    if not _whole(quick := settings.get("fast_dev_run", False), 0) and not isinstance(quick, (bool, NoneType)):
        raise ConfigError(f"trainer.fast_dev_run: must be true, false or a number of batches, got {quick!r}")
    if settings.get("deterministic") not in (None, True, False, "warn"):
        raise ConfigError(f"trainer.deterministic: must be true, false or warn, got {settings['deterministic']!r}")
    clip = settings.get("gradient_clip_val")
    if clip is not None and (not isinstance(clip, (int, float)) or isinstance(clip, bool) or not 0 <= clip < inf):
        raise ConfigError(f"trainer.gradient_clip_val: must be a number >= 0, or null, got {clip!r}")
    devices = settings.get("devices")
    if isinstance(devices, (bool, float, dict)) or (isinstance(devices, int) and not -1 <= devices <= 1024):
        raise ConfigError(f"trainer.devices: must be a number of devices, their numbers, or auto, got {devices!r}")


def check_that_it_trains(trainer: Any) -> None:
    """Refuse a Trainer that does nothing in ``fit``.

    Raises:
        ConfigError: it is told to make no step.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if (value := getattr(trainer, name)) == 0:
            raise ConfigError(f"trainer.{name}: {value!r} leaves nothing to be trained on, and nothing to defend")


def _check_task(task: Any) -> None:
    """What data configs tell of their data, as far as they do, before others refer to it."""
    if not isinstance(task, dict):
        raise ConfigError(f"task: must be a group of settings, got {task!r}")
    shape, classes = task.get("shape", [1]), task.get("classes", 2)
    if "${" in f"{shape}{classes}":
        return  # once it is resolved
    if not isinstance(shape, list) or not shape or not all(_whole(size, 1) for size in shape):
        raise ConfigError(f"task.shape: must be a list of whole numbers >= 1, got {shape!r}")
    if not _whole(classes, 2):
        raise ConfigError(f"task.classes: must be a whole number >= 2, got {classes!r}")


def _names(optimize: Any) -> list[Any]:
    return (optimize or [None]) if isinstance(optimize, list) else [optimize]


def _check_metrics(optimize: Any) -> None:
    for name in _names(optimize):
        if name not in METRICS:
            raise ConfigError(f"optimize: {name!r} is none of {', '.join(METRICS)}{hint(str(name), METRICS)}")


def _check_judge(judge: dict[str, Any], known: Sequence[str]) -> None:
    for name in judge:
        if name not in known:
            raise ConfigError(f"judge.{name}: there is no such setting{hint(str(name), known)}")
    if not isinstance(judge.get("attacks"), dict):
        raise ConfigError(f"judge.attacks: must be attacks by name, got {judge.get('attacks')!r}")
    if (limit := judge.get("limit_batches")) is not None and not _whole(limit, 1):
        raise ConfigError(f"judge.limit_batches: must be a whole number >= 1, or null for all, got {limit!r}")
    curve = judge.get("curve")
    if not isinstance(curve, list) or not all(_factor(value) for value in curve):
        raise ConfigError(f"judge.curve: must be a list of multiples of threat.eps, from 0 to 1000, got {curve!r}")
    if not isinstance(checks := judge.get("checks", True), bool):
        raise ConfigError(f"judge.checks: must be true or false, got {checks!r}")
    if (draws := judge.get("draws")) is not None and not (_whole(draws, 1) and draws <= MOST):
        raise ConfigError(f"judge.draws: must be a whole number >= 1, or null, got {draws!r}")
    if not (_whole(examples := judge.get("examples", 0), 0) and examples <= MOST_EXAMPLES):
        raise ConfigError(f"judge.examples: must be a whole number from 0 to {MOST_EXAMPLES}, got {examples!r}")
    if (shards := judge.get("shards")) is not None and not (isinstance(shards, str) and shards):
        raise ConfigError(f"judge.shards: must be a folder, or null, got {shards!r}")
    groups = judge.get("groups")
    if groups is not None and not (_whole(groups, -MOST) or (isinstance(groups, str) and groups)):
        raise ConfigError(f"judge.groups: must be an index, a name or a dotted path, or null, got {groups!r}")
    if not isinstance(corruptions := judge.get("corruptions", False), (bool, list, NoneType)):
        raise ConfigError(f"judge.corruptions: must be true, false or a list of kinds, got {corruptions!r}")


def _endless(cfg: DictConfig) -> list[str]:
    """The settings that refer to others in a circle."""
    found = []
    for key in dotted_keys(cfg):
        *above, last = key.split(".")
        parent: Any = OmegaConf.select(cfg, ".".join(above)) if above else cfg
        if not OmegaConf.is_interpolation(parent, last):
            continue
        try:
            value = parent[last]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        except RecursionError:
            found.append(key)
    return found


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1000
