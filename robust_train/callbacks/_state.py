"""What can hold state, and how its content is exchanged and put back. Used by the sandbox."""

from __future__ import annotations

import io
import random
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, Dataset

LONGEST_CONTAINER = 4096  # what longer lists hold is not looked into; the list itself is put back all the same
# the objects of these packages are not state of the user's
SKIPPED_PACKAGES = frozenset(
    (
        *("builtins", "torch", "numpy", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"),
        *("robust_train", "hydra", "omegaconf", "logging", "threading", "pathlib", "functools", "transformers"),
    )
)
UNCHANGEABLE = frozenset((type(None), bool, int, float, str, bytes, type, types.FunctionType, types.MethodType))


class Replay(Iterator):
    """An iterator's stand-in that remembers what was drawn, so that every call of a step draws the same."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.drawn: list[Any] = []
        self._at = 0

    def rewound(self) -> Replay:
        """Itself, back at the start."""
        self._at = 0
        return self

    def __next__(self) -> Any:
        if self._at == len(self.drawn):
            self.drawn.append(next(self.source))
        self._at += 1
        return self.drawn[self._at - 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    @property
    def finished(self) -> bool:
        """Whether everything remembered was drawn again, so that the source itself can go on."""
        return self._at == len(self.drawn)


def is_exchanged(value: Any) -> bool:
    """Whether a step may write into ``value`` itself, or draw from it: such values are exchanged for an extra call."""
    if type(value) in UNCHANGEABLE or isinstance(value, nn.Parameter):
        return False
    if isinstance(value, tuple):
        return any(map(is_exchanged, value))
    return isinstance(value, (Tensor, np.ndarray, Iterator)) and not isinstance(value, io.IOBase)


def values_in(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else content if len(content) <= LONGEST_CONTAINER else ()


def finished(value: Any) -> Any:
    """The source of a replay that is through; another replay goes on as it is."""
    return value.source if isinstance(value, Replay) and value.finished else value


class Holder(ABC):
    """Something whose content is exchanged while its identity stays."""

    @abstractmethod
    def content(self) -> Any:
        """What it holds now."""

    @abstractmethod
    def fill(self, content: Any, exchange: Callable[[Any], Any]) -> None:
        """Put ``exchange(value)`` in each value's place."""

    @abstractmethod
    def put_back(self, content: Any) -> None:
        """Hold exactly ``content`` again."""


class Attributes(Holder):
    """A namespace: attributes of a module or object, or a module's buffers."""

    def __init__(self, namespace: dict[str, Any], skipped: frozenset[str] = frozenset()) -> None:
        self._namespace, self._skipped = namespace, skipped

    def content(self) -> dict[str, Any]:
        return {k: v for k, v in self._namespace.items() if k not in self._skipped}

    def fill(self, content: dict[str, Any], exchange: Callable[[Any], Any]) -> None:
        for key, value in content.items():
            if (other := exchange(value)) is not value:
                self._namespace[key] = other

    def put_back(self, content: dict[str, Any]) -> None:
        for key in [k for k in self._namespace if k not in content and k not in self._skipped]:
            del self._namespace[key]
        for key, value in content.items():
            if self._namespace.get(key, self) is not value:
                self._namespace[key] = value


class Slots(Holder):
    """Attributes of an object whose class has ``__slots__``."""

    def __init__(self, owner: Any, names: list[str]) -> None:
        self._owner, self._names = owner, names

    def content(self) -> dict[str, Any]:
        return {name: getattr(self._owner, name) for name in self._names if hasattr(self._owner, name)}

    def fill(self, content: dict[str, Any], exchange: Callable[[Any], Any]) -> None:
        for name, value in content.items():
            if (other := exchange(value)) is not value:
                object.__setattr__(self._owner, name, other)

    def put_back(self, content: dict[str, Any]) -> None:
        for name in self._names:
            if name in content:
                object.__setattr__(self._owner, name, content[name])
            elif hasattr(self._owner, name):
                object.__delattr__(self._owner, name)


class Statistics(Attributes):
    """Running statistics, which a layer writes only while it trains them."""

    def __init__(self, layer: _NormBase) -> None:
        super().__init__(layer._buffers)
        self._layer = layer

    def content(self) -> dict[str, Any]:
        return super().content() if self._layer.training and self._layer.track_running_stats else {}

    def put_back(self, content: dict[str, Any]) -> None:
        if content:
            super().put_back(content)


class Container(Holder):
    """A list, deque, dict or set."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def content(self) -> Any:
        return dict(self._container) if isinstance(self._container, dict) else list(self._container)

    def fill(self, content: Any, exchange: Callable[[Any], Any]) -> None:
        if len(content) > LONGEST_CONTAINER or isinstance(self._container, set):
            return
        if isinstance(content, dict):
            others: Any = {k: exchange(v) for k, v in content.items()}
            changed = any(others[k] is not v for k, v in content.items())
        else:
            others = [exchange(v) for v in content]
            changed = any(o is not v for o, v in zip(others, content, strict=True))
        if changed:
            self.put_back(others)

    def put_back(self, content: Any) -> None:
        if isinstance(self._container, list):
            self._container[:] = content
            return
        self._container.clear()
        (self._container.extend if isinstance(self._container, deque) else self._container.update)(content)


def slots_of(value: Any) -> list[str]:
    names = [n for cls in type(value).__mro__ for n in _as_tuple(cls.__dict__.get("__slots__", ()))]
    return [n for n in names if n not in ("__dict__", "__weakref__")]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def is_plain_object(value: Any) -> bool:
    """An object of the user's own classes, such as a running-average meter."""
    kinds = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
    if isinstance(value, (*kinds, torch.optim.Optimizer, Dataset, DataLoader, Iterator)):
        return False
    if any(cls.__name__ == "LightningDataModule" for cls in type(value).__mro__):  # of either Lightning package
        return False
    return type(value).__module__.partition(".")[0] not in SKIPPED_PACKAGES


def is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
