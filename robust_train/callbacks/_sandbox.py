"""Extra calls of the user's own step that leave no trace.

Crafting an adversarial example calls ``training_step`` several more times than the user wrote. Whatever those calls
log, count, append, update or draw must not be seen afterwards, and each must see exactly what the real call will see.

The means: every holder of mutable state that can be reached from the module (modules, plain objects, lists, dicts,
sets) keeps its identity; its tensors are exchanged for copies while the extra call runs, and its exact old content is
put back afterwards. Tensors of the user are therefore never written, which also keeps pending autograd graphs valid.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torchmetrics import Metric

from robust_train.callbacks._seams import silenced
from robust_train.evasion.randomness import get_global_rng, numpy_moved, set_global_rng
from robust_train.evasion.victim import frozen

MODES = ("eval", "batch", "train")
LONGEST_CONTAINER = 4096  # what longer lists hold is not looked into; the list itself is put back all the same
DEEPEST = 6
# not state of the user's: the framework's own attributes of a module, and the objects of these packages
SKIPPED_ATTRIBUTES = frozenset(
    ("_parameters", "_buffers", "_modules", "_trainer", "_fabric", "_compiler_ctx", "_compiled_call_impl", "training")
)
SKIPPED_PACKAGES = frozenset(
    (
        *("builtins", "torch", "numpy", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"),
        *("robust_train", "hydra", "omegaconf", "logging", "threading", "pathlib", "functools", "transformers"),
    )
)


class Sandbox:
    """Runs extra calls of a module's step.

    Args:
        module: the user's LightningModule.
        trainer: its Trainer.
        device: where the batch lives.
        guarded: parameters that the step may write to itself (a momentum teacher, clipped weights): put back after each
            call.

    Attributes:
        written: those of ``guarded`` that an extra call did write to.

    The state that the extra calls see is the module's at the time of each call; random generators, global and held by
    the module, always start from where they stood when the sandbox was made.
    """

    def __init__(self, module: Any, trainer: Any, device: torch.device, guarded: Iterable[nn.Parameter] = ()) -> None:
        self._guarded = [
            p for p in guarded if not hasattr(p, "to_local")
        ]  # sharded ones are written by nobody but FSDP
        self.written: set[nn.Parameter] = set()
        self._module, self._trainer, self._device = module, trainer, device
        self._rng = get_global_rng(device)
        self._numpy_used: bool | None = None
        self._holders: list[_Holder] = []
        self._generators: dict[int, tuple[Any, Any]] = {}
        self._visit(module, 0, {id(trainer)})

    @contextmanager
    def opened(self, mode: str, frozen_parameters: bool = True) -> Iterator[None]:
        """For a series of extra calls, each inside ``call``: parameters frozen, modes set, logging silenced."""
        rng = get_global_rng(self._device)
        with ExitStack() as stack:
            stack.callback(set_global_rng, rng, self._device)
            if frozen_parameters:
                stack.enter_context(frozen(self._module))
            stack.enter_context(crafting_mode(self._module, mode))
            stack.enter_context(silenced(self._module, self._trainer))
            yield

    def call(self, step: Callable[[], Any]) -> Any:
        """One extra call; the module and its generators are as before afterwards, the global ones after the series."""
        generators = [(g, _generator_state(g)) for g, _ in self._generators.values()]
        contents = [holder.content() for holder in self._holders]
        copies: dict[int, Tensor] = {}
        values = [(p, p.data, p.detach().clone()) for p in self._guarded]
        first = self._numpy_used is None
        try:
            for holder, content in zip(self._holders, contents, strict=True):
                holder.fill_with_copies(content, copies)
            set_global_rng(self._rng, self._device, numpy=first or bool(self._numpy_used))
            for generator, state in self._generators.values():
                _set_generator_state(generator, state)
            return step()
        finally:
            for holder, content in zip(self._holders, contents, strict=True):
                holder.put_back(content)
            for generator, state in generators:
                _set_generator_state(generator, state)
            for p, storage, value in values:
                if p.data_ptr() != storage.data_ptr():
                    p.data = storage
                    self.written.add(p)
                if not torch.equal(storage, value):
                    storage.copy_(value)
                    self.written.add(p)
            if first:  # a step that draws from numpy does so in every call
                self._numpy_used = numpy_moved(self._rng)

    def _visit(self, value: Any, depth: int, seen: set[int]) -> None:
        if id(value) in seen or depth > DEEPEST or value is None or isinstance(value, (str, bytes, int, float, Tensor)):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            self._visit_module(value, depth, seen)
        elif _is_generator(value):
            self._generators[id(value)] = (value, _generator_state(value))
        elif isinstance(value, (list, dict, set, deque)):
            self._holders.append(_Container(value))
            if len(value) <= LONGEST_CONTAINER:
                for item in list(value.values()) if isinstance(value, dict) else list(value):
                    self._visit(item, depth + 1, seen)
        elif isinstance(value, tuple) and len(value) <= LONGEST_CONTAINER:
            for item in value:
                self._visit(item, depth + 1, seen)
        elif _is_plain_object(value):
            self._holders.append(_Attributes(value.__dict__))
            for item in list(value.__dict__.values()):
                self._visit(item, depth + 1, seen)

    def _visit_module(self, module: nn.Module, depth: int, seen: set[int]) -> None:
        builtin = type(module).__module__.startswith("torch.nn")
        if module._buffers:
            self._holders.append(_Statistics(module) if isinstance(module, _NormBase) else _Attributes(module._buffers))
        if not builtin:  # torch's own layers keep nothing but buffers
            self._holders.append(_Attributes(module.__dict__, SKIPPED_ATTRIBUTES))
            for name, item in list(module.__dict__.items()):
                if name not in SKIPPED_ATTRIBUTES and not name.endswith("_hooks"):
                    self._visit(item, depth + 1, seen)
        for child in module._modules.values():
            if child is not None:
                self._visit(child, 0, seen)


class _Holder:
    """Something whose content is exchanged while its identity stays."""

    def content(self) -> Any:
        raise NotImplementedError  # pragma: no cover

    def fill_with_copies(self, content: Any, copies: dict[int, Tensor]) -> None:
        raise NotImplementedError  # pragma: no cover

    def put_back(self, content: Any) -> None:
        raise NotImplementedError  # pragma: no cover


class _Attributes(_Holder):
    """A namespace: attributes of a module or object, or a module's buffers."""

    def __init__(self, namespace: dict[str, Any], skipped: frozenset[str] = frozenset()) -> None:
        self._namespace, self._skipped = namespace, skipped

    def content(self) -> dict[str, Any]:
        return {k: v for k, v in self._namespace.items() if k not in self._skipped}

    def fill_with_copies(self, content: dict[str, Any], copies: dict[int, Tensor]) -> None:
        for key, value in content.items():
            if isinstance(value, Tensor):
                self._namespace[key] = _copy(value, copies)

    def put_back(self, content: dict[str, Any]) -> None:
        for key in [k for k in self._namespace if k not in content and k not in self._skipped]:
            del self._namespace[key]
        for key, value in content.items():
            if self._namespace.get(key, self) is not value:
                self._namespace[key] = value


class _Statistics(_Attributes):
    """Running statistics, which a layer writes only while it trains them."""

    def __init__(self, layer: _NormBase) -> None:
        super().__init__(layer._buffers)
        self._layer = layer

    def content(self) -> dict[str, Any]:
        return super().content() if self._layer.training and self._layer.track_running_stats else {}

    def put_back(self, content: dict[str, Any]) -> None:
        if content:
            super().put_back(content)


class _Container(_Holder):
    """A list, deque, dict or set."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def content(self) -> Any:
        return dict(self._container) if isinstance(self._container, dict) else list(self._container)

    def fill_with_copies(self, content: Any, copies: dict[int, Tensor]) -> None:
        if len(content) > LONGEST_CONTAINER:
            return
        values = content.values() if isinstance(content, dict) else content
        if not any(isinstance(value, Tensor) for value in values):
            return
        if isinstance(content, dict):
            self._refill({k: _copy(v, copies) if isinstance(v, Tensor) else v for k, v in content.items()})
        elif not isinstance(self._container, set):
            self._refill([_copy(v, copies) if isinstance(v, Tensor) else v for v in content])

    def put_back(self, content: Any) -> None:
        self._refill(content)

    def _refill(self, content: Any) -> None:
        if isinstance(self._container, list):
            self._container[:] = content
            return
        self._container.clear()
        (self._container.extend if isinstance(self._container, deque) else self._container.update)(content)


def _copy(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """A private copy; tensors that were shared stay shared."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    if id(tensor) not in copies:
        copies[id(tensor)] = tensor.detach().clone() if not tensor.requires_grad or tensor.is_leaf else tensor.clone()
    return copies[id(tensor)]


def _is_plain_object(value: Any) -> bool:
    """An object of the user's own classes, such as a running-average meter."""
    kinds = (
        type,
        types.ModuleType,
        types.FunctionType,
        types.MethodType,
        types.BuiltinFunctionType,
        torch.optim.Optimizer,
    )
    if isinstance(value, kinds) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return type(value).__module__.partition(".")[0] not in SKIPPED_PACKAGES


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextmanager
def crafting_mode(module: nn.Module, mode: str) -> Iterator[None]:
    """Which behaviour of dropout and batch normalisation the attack sees; every flag is as before afterwards.

    Args:
        module: the user's module. Only layers are switched, never the modules that contain them: some models return
            another kind of output in eval mode.
        mode: ``"eval"``: no dropout, running statistics. ``"batch"``: no dropout, statistics of the batch, running
            statistics untouched. ``"train"``: everything as in training; what it updates is undone by the sandbox.
    """
    undo: list[tuple[nn.Module, str, bool]] = []
    try:
        if mode != "train":
            for layer in module.modules():
                is_layer = next(layer.children(), None) is None or isinstance(layer, nn.MultiheadAttention)
                if layer is module or not is_layer or not layer.training or isinstance(layer, Metric):
                    continue
                if mode == "batch" and isinstance(layer, _BatchNorm):
                    undo.append((layer, "track_running_stats", layer.track_running_stats))
                    layer.track_running_stats = False
                else:
                    undo.append((layer, "training", True))
                    layer.training = False
        yield
    finally:
        for layer, flag, value in undo:
            setattr(layer, flag, value)
