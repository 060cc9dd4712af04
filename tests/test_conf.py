"""Every yaml below ``conf/<group>/`` says what the code says, and can be built.

The yaml that bears the name of its class's module (``conf/attack/pgd.yaml`` for ``attacks/pgd.py``) is the class's full
list of settings, with the defaults of the code. Any other yaml for that class is a preset that starts from it.
"""

import dataclasses
import importlib
import inspect
from fractions import Fraction
from typing import Any

import pytest
import torch
from hydra import compose, initialize
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from robust_train.config import build
from robust_train.hydra_plugin import config_dir, register

CONF = config_dir("conf")
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
METHODS = ("attack", "objective", "callback", "clipping", "filter", "poison", "policy", "probe")
NEEDED = {  # what has no default that could be right for anyone
    "callback/dp_sgd": {"noise_multiplier": 1.0},
    "callback/extra_data": {"data": "rows.npy"},
}
DATA = {"model/text_classifier": "python_docs"}  # what the others are not for
REQUIRED = inspect.Parameter.empty
GPU = ("trainer/16-mixed", "trainer/fsdp")


def composed(name: str) -> DictConfig:
    """The node that ``group/stem`` makes, in a config that has what a node may refer to: a threat and a task."""
    group, stem = name.split("/")
    choices = {"threat": "threat", "data": DATA.get(name, "digits")} | {group: stem}
    if group == "threat":
        del choices["data"]  # a data set brings an eps of its own
    mounts = "hydra.searchpath=[robust-train://,robust-train://robust_train]"
    register()
    with initialize(config_path=None, version_base="1.3"):
        return compose(overrides=[mounts, *(f"+{key}={value}" for key, value in choices.items())])[group]


def settings(node: DictConfig) -> dict[str, Any]:
    """A node's keys and values, interpolations left as they are written."""
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in ("_target_", "_convert_")}


def parameters(cls: type) -> dict[str, Any]:
    """What a class can be given by name, and the default or ``REQUIRED``."""
    if dataclasses.is_dataclass(cls):
        factories = {f.name: f.default_factory for f in dataclasses.fields(cls) if callable(f.default_factory)}
    else:
        factories = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(cls).parameters.values()
    return {p.name: factories[p.name]() if p.name in factories else p.default for p in found if p.kind in named}


def same(written: Any, default: Any) -> bool:
    """Whether a yaml's value means the default; what is only known in a whole config is not compared."""
    if default is REQUIRED or (isinstance(written, dict) and "_target_" in written) or "${" in str(written):
        return True
    if isinstance(written, list) and isinstance(default, (list, tuple)):
        return len(written) == len(default) and all(map(same, written, default))
    if isinstance(written, str) and isinstance(default, (int, float)):
        return float(Fraction(written)) == pytest.approx(default)
    return written == default and isinstance(written, bool) == isinstance(default, bool)


@pytest.mark.parametrize("name", FILES)
def test_the_target_is_a_class_and_has_every_key(name):
    node = composed(name)
    cls = get_object(node._target_)
    assert inspect.isclass(cls)
    assert importlib.import_module(cls.__module__)
    assert set(settings(node)) <= set(parameters(cls))


@pytest.mark.parametrize("name", FILES)
def test_it_is_the_full_list_or_starts_from_it(name):
    group, stem = name.split("/")
    node = composed(name)
    cls = get_object(node._target_)
    full = cls.__module__.rpartition(".")[2]
    if stem == full:
        written, defaults = settings(node), parameters(cls)
        assert set(written) == set(defaults)
        assert {key: value for key, value in written.items() if not same(value, defaults[key])} == {}
    elif (CONF / group / f"{full}.yaml").is_file():
        assert OmegaConf.load(CONF / f"{name}.yaml").defaults[0] == full
    else:
        assert group not in METHODS, f"conf/{group}/{full}.yaml is missing"


@pytest.mark.parametrize("name", FILES)
def test_it_can_be_built(name):
    if "torchattack" in name:
        pytest.importorskip("torchattacks")
    if name in GPU and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    node = composed(name)
    try:
        built = build(OmegaConf.merge(node, NEEDED.get(name, {})))  # pyright: ignore[reportArgumentType]
        assert isinstance(built, get_object(node._target_))
    finally:
        torch.use_deterministic_algorithms(False)  # a Trainer sets it for the whole process
