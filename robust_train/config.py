"""From a config to objects: the only place that lets a config choose which Python code runs.

A config may come from a stranger, as recipes and checkpoints do, and whatever its ``_target_`` names is called. So
``build`` first checks every target against an allow-list: a name that is not on it never reaches Hydra.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hydra.utils
from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.version import VersionBase
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robust_train.explain import dotted_keys, explained, hint, in_one_line
from robust_train.hydra_plugin import config_dir, register

ALLOWED = (
    "robust_train",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torchmetrics",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "torchattacks",
)

# What these make calls further targets of its own choosing, past the checks here.
REFUSED = ("robust_train.cli", "robust_train.config", "pytorch_lightning.cli", "lightning.pytorch.cli")

# What Hydra's own settings of a node may be; it takes others for nothing said.
SPECIAL = {
    "_convert_": ("none", "partial", "object", "all"),
    "_recursive_": (True, False),
    "_partial_": (True, False),
}

# The same classes under the names they have where only `pytorch_lightning` is installed.
STANDALONE = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


class ConfigError(ValueError):
    """A config cannot be built; the message is one line that names the key and what to change."""


def build(node: Any, *, allow: Sequence[str] = ()) -> Any:
    """Make the objects that a config node describes with its ``_target_`` keys, nested ones included.

    Args:
        node: a config node, or plain dicts and lists of the same form. It is not changed.
        allow: packages, such as ``["my_pkg"]``, whose classes and functions a ``_target_`` may name besides ours and
            those of ``ALLOWED``. It must come from the user or from code, never from the config it judges.

    Returns:
        The object of a node that has a ``_target_``; for other nodes dicts and lists that hold the objects.
        Containers are plain ``dict`` and ``list`` throughout.

    Raises:
        ConfigError: a target is not allowed or does not exist, a value is missing, or a constructor refused its
            arguments (then ``__cause__`` is the constructor's own error).

    Guarantees:
        Nothing is called before every target of the node has been checked. A target is a class that is defined below an
        allowed package, however its name reaches it; only those of ``allow`` may be functions.
    """
    if isinstance(allow, str) or not all(_is_dotted(name) for name in allow):
        raise ConfigError(f"allow must be a list of package names such as ['my_pkg'], got {allow!r}")
    config = node if isinstance(node, Container) else OmegaConf.create(node, flags={"allow_objects": True})
    root = config._get_full_key(None)  # private: OmegaConf tells a node's place in the whole config in no other way
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as cause:
        raise ConfigError(f"{cause.full_key or root or 'config'}: {in_one_line(cause)}") from cause
    with _hydra_whitelist((*ALLOWED, *allow)):
        vetted = _vet(plain, root, tuple(allow))
        try:
            return hydra.utils.instantiate(vetted, _convert_="all")
        except Exception as error:
            # Hydra 1.3 wraps a constructor's error and writes the key into its text; Hydra 1.4 adds the key as a note.
            cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
            place = re.search(
                r"^full_key: (.*)$", "\n".join([str(error), *getattr(error, "__notes__", [])]), re.MULTILINE
            )
            key = ".".join(part for part in (root, place[1] if place else "") if part) or "config"
            raise ConfigError(_no_such_setting(cause, key) or f"{key}: {in_one_line(cause)}") from cause


def recipe(name: str, *overrides: str, allow: Sequence[str] = ()) -> list[Any]:
    """A recipe's callbacks, for notebooks and plain scripts: ``Trainer(callbacks=recipe("pgd_at"))``.

    It may be called inside another Hydra app, whose state it leaves as it was.

    Args:
        name: a file of ``recipes/`` without ``.yaml``.
        overrides: changes in Hydra's syntax, such as ``"threat.eps=4/255"``.
        allow: as in ``build``.

    Returns:
        The callbacks in the recipe's order; one that an override set to ``null`` is left out.

    Raises:
        ConfigError: there is no such recipe, an override does not fit, a callback cannot be built, or the recipe's
            defence is left out.
    """
    nodes = recipe_config(name, *overrides).get("callbacks") or {}
    if not isinstance(nodes, DictConfig):
        raise ConfigError(f"callbacks: must be callbacks by name, got {nodes!r}")
    callbacks = {key: callback for key, callback in build(nodes, allow=allow).items() if callback is not None}
    for key, callback in callbacks.items():
        if not callable(getattr(callback, "on_fit_start", None)):
            raise ConfigError(f"callbacks.{key}._target_: must name a Lightning callback, got {callback!r:.80}")
    if overrides:
        check_defences(name, callbacks.values())
    return list(callbacks.values())


def check_defences(name: str, callbacks: Iterable[Any]) -> None:
    """Refuse a run that would bear a recipe's name without what it defends by.

    Args:
        name: of the recipe; of others than ours nothing is known.
        callbacks: that the run has.

    Raises:
        ConfigError: one of the recipe's defences is missing.
    """
    if name not in recipe_names():
        return
    kinds = {kind.__name__ for callback in callbacks for kind in type(callback).__mro__}
    for key, node in recipe_config(name).callbacks.items():
        defence = _locate(node["_target_"], f"callbacks.{key}._target_")
        if defence.defends and defence.__name__ not in kinds:
            raise ConfigError(
                f"callbacks.{key}: without {defence.__name__} recipe={name} would train undefended; if that is "
                "what you want, use recipe=standard"
            )


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    folder = config_dir("recipes")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_config(name: str, *overrides: str) -> DictConfig:
    """What a recipe consists of, composed and not built: its callbacks, and the threat that they share.

    Args:
        name: as in ``recipe``.
        overrides: as in ``recipe``.

    Raises:
        ConfigError: there is no such recipe, or an override does not fit.
    """
    if name not in (known := recipe_names()):
        raise ConfigError(f"recipe: there is no {name!r}{hint(name, known)}; available: {', '.join(known)}")
    register()
    outer, version = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()

    def composed(*changes: str) -> DictConfig:
        mounts = "hydra.searchpath=[robust-train://,robust-train://robust_train]"
        return compose(overrides=[mounts, f"+recipe={name}", *changes])

    try:
        with initialize(config_path=None, version_base="1.3"):
            try:
                return composed(*overrides)
            except (HydraException, OmegaConfBaseException) as cause:
                raise ConfigError(f"recipe {name!r}: {explained(cause, lambda: dotted_keys(composed()))}") from cause
    finally:
        GlobalHydra.instance().hydra, VersionBase.instance().version_base = outer, version


def _no_such_setting(error: BaseException, key: str) -> str | None:
    """What to say of an argument that a constructor does not have, with the nearest that it has."""
    found = re.search(r"([\w.]+?)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or found is None or error.__traceback__ is None:
        return None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)  # of the call that was refused
    called = next((v for v in frame.f_locals.values() if getattr(v, "__qualname__", None) == found[1]), None)
    known = inspect.signature(called).parameters if called is not None else ()
    return f"{key}.{found[2]}: {found[1]} has no such setting{hint(found[2], known)}"


def _vet(value: Any, key: str, allow: tuple[str, ...]) -> Any:
    """A copy of ``value`` in which every target is one that may be called."""
    if isinstance(value, list):
        return [_vet(item, f"{key}[{index}]", allow) for index, item in enumerate(value)]
    if isinstance(value, dict):
        vetted = {name: _vet(item, f"{key}.{name}".lstrip("."), allow) for name, item in value.items()}
        for name, choices in SPECIAL.items():
            if name in value and value[name] not in choices:
                raise ConfigError(f"{key}.{name}".lstrip(".") + f": must be one of {choices}, got {value[name]!r}")
        if "_target_" in value:
            vetted["_target_"] = _vet_target(value["_target_"], f"{key}._target_".lstrip("."), allow)
        return vetted
    if isinstance(value, str) and "${" in value:
        # Hydra resolves once more what it is given: an escaped interpolation could bring in a target not seen here.
        raise ConfigError(f"{key}: {value!r} still holds an interpolation after resolution; write the value itself")
    return value


def _vet_target(target: Any, key: str, allow: tuple[str, ...]) -> str:
    """The name under which Hydra shall call ``target``, or the reason why it shall not."""
    if not _is_dotted(target):
        raise ConfigError(f"{key}: must be a dotted name such as 'robust_train.PGD', got {target!r}")
    allowed = (*ALLOWED, *allow)
    if not _below(target, allowed):
        raise ConfigError(f"{key}: {target!r} is not below an allowed package; {_how_to_allow(target)}")
    if importlib.util.find_spec("lightning") is None:
        for unified, standalone in STANDALONE.items():
            if _below(target, [unified]):
                target = standalone + target.removeprefix(unified)

    found = _locate(target, key)
    if not callable(found):
        raise ConfigError(f"{key}: {target!r} is neither a class nor a function")
    home = str(found.__module__)
    if not _below(home, allowed):
        raise ConfigError(
            f"{key}: {target!r} is defined in {home!r}, not below an allowed package; {_how_to_allow(home)}"
        )
    if _below(home, REFUSED):
        raise ConfigError(f"{key}: {target!r} would call other targets unchecked; name those targets themselves")
    if not inspect.isclass(found) and not _below(home, allow):  # functions of ours write files, too
        raise ConfigError(
            f"{key}: {target!r} is not a class; wrap it in a function of yours and {_how_to_allow('my_pkg')}"
        )
    return target


def _locate(target: str, key: str) -> Any:
    """What Hydra would find under a dotted name: an attribute first, a module second."""
    parts = target.split(".")
    try:
        found = importlib.import_module(parts[0])
    except ImportError as cause:
        raise ConfigError(f"{key}: cannot import {target!r}: {in_one_line(cause)}") from cause
    for depth, part in enumerate(parts[1:], start=2):
        parent = found
        try:
            found = getattr(parent, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:depth]))
            except ImportError as cause:
                beside = [".".join([*parts[: depth - 1], name]) for name in _names_in(parent)]
                nearest = hint(".".join(parts[:depth]), beside) if parts[0] == "robust_train" else ""
                raise ConfigError(f"{key}: cannot import {target!r}: {in_one_line(cause)}{nearest}") from cause
    return found


def _names_in(parent: Any) -> list[str]:
    """The public names of a module or class, a package's modules among them."""
    modules = [module.name for module in pkgutil.iter_modules(getattr(parent, "__path__", []))]
    return [name for name in {*dir(parent), *modules} if not name.startswith("_")]


def _hydra_whitelist(packages: Iterable[str]) -> AbstractContextManager[Any]:
    """Hydra 1.4's own check of targets, set to the same packages; nothing under Hydra 1.3, which has none."""
    whitelist = getattr(hydra.utils, "execution_whitelist", None)
    return whitelist([f"{package}.*" for package in packages]) if whitelist else nullcontext()


def _is_dotted(name: Any) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _below(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _how_to_allow(name: str) -> str:
    return f"if you trust it, pass allow=[{name.partition('.')[0]}]"
