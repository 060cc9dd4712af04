"""Extra calls of the user's own step that leave no trace.

Crafting an adversarial example calls ``training_step`` several more times than the user wrote. Whatever those calls
log, count, append, update or draw must not be seen afterwards, and each must see exactly what the real call will see.

The means: every holder of mutable state that can be reached from the module (modules, plain objects, lists, dicts,
sets) keeps its identity; its tensors and arrays are exchanged for copies while the extra call runs, its iterators for
ones that replay, and its exact old content is put back afterwards. Tensors of the user are therefore never written,
which also keeps pending autograd graphs valid. Parameters, which others hold by identity, are written back instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torchmetrics import Metric

from robust_train.callbacks._callback import Callback
from robust_train.callbacks._seams import silenced
from robust_train.callbacks._state import (
    LONGEST_CONTAINER,
    Attributes,
    Container,
    Holder,
    Replay,
    Slots,
    Statistics,
    finished,
    generator_state,
    is_exchanged,
    is_generator,
    is_plain_object,
    set_generator_state,
    slots_of,
    values_in,
)
from robust_train.evasion.randomness import get_global_rng, numpy_moved, seed_global_rng, set_global_rng
from robust_train.evasion.victim import frozen

MODES = ("eval", "batch", "train")
DEEPEST = 6
# the framework's own attributes of a module
SKIPPED_ATTRIBUTES = frozenset(
    ("_parameters", "_buffers", "_modules", "_trainer", "_fabric", "_compiler_ctx", "_compiled_call_impl", "training")
)


class Sandbox:
    """Runs extra calls of a module's step.

    Args:
        module: the user's LightningModule.
        trainer: its Trainer.
        device: where the batch lives.

    The state that the extra calls see is the module's at the time of each call; random generators, global and held by
    the module, always start from where they stood when the sandbox was made, and iterators too.

    Note:
        Holds a copy of the parameters while it lives, because a step may write to them (a momentum teacher, clipped
        weights), also through ``.data``, where autograd does not see it.
    """

    def __init__(self, module: Any, trainer: Any, device: torch.device) -> None:
        self._module, self._trainer, self._device = module, trainer, device
        self._rng = get_global_rng(device)
        self._numpy_used: bool | None = None
        self._holders: list[Holder] = []
        self._generators: dict[int, tuple[Any, Any]] = {}
        self._layers: list[nn.Module] = []  # also modules that the user keeps in a plain list
        self._replays: dict[int, Replay] = {}
        self._values: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._contents: list[tuple[Holder, Any]] = []
        self._exchanged: list[tuple[Holder, Any]] = []
        self._visit(module, 0, {id(trainer)})
        self._parameters = list(dict.fromkeys(p for m in self._layers for p in m._parameters.values() if p is not None))
        self._versions = _versions(self._parameters)  # when the real call began

    @contextmanager
    def opened(self, mode: str, frozen_parameters: bool = True, pausing: bool = True) -> Iterator[None]:
        """For a series of extra calls, each inside ``call``: parameters frozen, modes set, logging silenced.

        With ``pausing``, callbacks of ours that record what training differentiates do not see these calls.
        """
        rng = get_global_rng(self._device)
        # those that FSDP shards are written by nobody else, and change their storage in every forward pass
        whole = tuple(p for p in self._parameters if not hasattr(p, "to_local"))
        self._values = [(p, p.data, p.detach().clone()) for p in whole]
        grads = [(p, p.grad) for p in self._parameters if p.grad is not None]
        for p, _ in grads:  # out of the step's reach: it may clear them
            p.grad = None
        with ExitStack() as stack:
            stack.callback(set_global_rng, rng, self._device)  # in case a later call is the first to draw from numpy
            stack.callback(_give_back, grads)
            if frozen_parameters:
                stack.enter_context(frozen(self._parameters))
            elif whole:
                # The graph of the real call is pending. A step that writes to its parameters bumps their versions in
                # each call; as values are put back, both graphs stay valid if this call counts from where that one did.
                stack.enter_context(_unsafe_preserve_version_counter(whole))
                _set_versions(whole, self._versions)
            stack.enter_context(crafting_mode(self._layers, self._module, mode))
            stack.enter_context(silenced(self._module, self._trainer))
            for callback in self._trainer.callbacks:
                if pausing and isinstance(callback, Callback):
                    stack.enter_context(callback.paused())
            self._contents = [(holder, holder.content()) for holder in self._holders]
            self._exchanged = [
                (h, content) for h, content in self._contents if any(map(is_exchanged, values_in(content)))
            ]
            try:
                yield
            finally:
                self._values, self._contents, self._exchanged = [], [], []

    def call(self, step: Callable[[], Any]) -> Any:
        """One extra call; afterwards the module and all generators are as before it.

        The global generators too, call by call: the attack may draw from them between the calls.
        """
        generators = [(g, generator_state(g)) for g, _ in self._generators.values()]
        copies: dict[int, Any] = {}
        first = self._numpy_used is None
        numpy = first or bool(self._numpy_used)
        rng = get_global_rng(self._device, numpy)
        try:
            for holder, content in self._exchanged:
                holder.fill(content, lambda value: self._copy(value, copies))
            set_global_rng(self._rng, self._device, numpy)
            for generator, state in self._generators.values():
                set_generator_state(generator, state)
            return step()
        finally:
            for holder, content in self._contents:
                holder.put_back(content)
            for generator, state in generators:
                set_generator_state(generator, state)
            for p, storage, _ in self._values:
                if p.data_ptr() != storage.data_ptr():
                    p.data = storage
            if self._values:  # through .data, so that autograd does not count it as a change
                stored, kept = [storage for _, storage, _ in self._values], [value for _, _, value in self._values]
                torch._foreach_copy_(stored, kept)  # pyright: ignore[reportPrivateImportUsage]
            if first:  # a step that draws from numpy does so in every call
                self._numpy_used = numpy_moved(self._rng)
            set_global_rng(rng, self._device)

    @contextmanager
    def reseeded(self, seed: int) -> Iterator[None]:
        """Inside, the global generators stand where ``seed`` puts them whenever an extra call begins."""
        stood, outside = self._rng, get_global_rng(self._device)
        seed_global_rng(seed)
        self._rng = get_global_rng(self._device)
        try:
            yield
        finally:
            self._rng = stood
            set_global_rng(outside, self._device)

    @property
    def drew_from_iterators(self) -> bool:
        """Whether an extra call has taken items from an iterator that the module holds."""
        return any(replay.drawn for replay in self._replays.values())

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """For the real call: it draws from the module's iterators what the extra calls have drawn before it."""
        self._versions = _versions(self._parameters)
        if not self.drew_from_iterators:
            yield
            return
        contents = [holder.content() for holder in self._holders]
        for holder, content in zip(self._holders, contents, strict=True):
            holder.fill(content, self._replay)
        try:
            yield
        finally:
            for holder in self._holders:
                holder.fill(holder.content(), finished)

    def _copy(self, value: Any, copies: dict[int, Any]) -> Any:
        """A private copy of what a step may write into; what was shared stays shared; all else as it is."""
        if not is_exchanged(value):
            return value
        if isinstance(value, tuple):
            items = [self._copy(v, copies) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, Iterator):
            return self._replay(value)
        if id(value) not in copies:
            if isinstance(value, np.ndarray):
                copies[id(value)] = value.copy()
            else:  # an intermediate result of the user's keeps its graph
                copies[id(value)] = (
                    value.clone() if value.requires_grad and not value.is_leaf else value.detach().clone()
                )
        return copies[id(value)]

    def _replay(self, value: Any) -> Any:
        if not isinstance(value, Iterator) or isinstance(value, Replay):
            return value
        return self._replays.setdefault(id(value), Replay(value)).rewound()

    def _visit(self, value: Any, depth: int, seen: set[int]) -> None:
        if id(value) in seen or depth > DEEPEST or value is None or isinstance(value, (str, bytes, int, float, Tensor)):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            self._visit_module(value, depth, seen)
        elif is_generator(value):
            self._generators[id(value)] = (value, generator_state(value))
        elif isinstance(value, (list, dict, set, deque)):
            self._holders.append(Container(value))
            if len(value) <= LONGEST_CONTAINER:
                self._visit_all(value.values() if isinstance(value, dict) else value, depth, seen)
        elif isinstance(value, tuple) and len(value) <= LONGEST_CONTAINER:
            self._visit_all(value, depth, seen)
        elif is_plain_object(value):
            if isinstance(getattr(value, "__dict__", None), dict):
                self._holders.append(Attributes(value.__dict__))
                self._visit_all(value.__dict__.values(), depth, seen)
            if slots := slots_of(value):
                self._holders.append(Slots(value, slots))
                self._visit_all(Slots(value, slots).content().values(), depth, seen)

    def _visit_all(self, values: Iterable[Any], depth: int, seen: set[int]) -> None:
        for value in list(values):
            self._visit(value, depth + 1, seen)

    def _visit_module(self, module: nn.Module, depth: int, seen: set[int]) -> None:
        self._layers.append(module)
        if isinstance(module, _NormBase):
            self._holders.append(Statistics(module))
        elif type(module).__module__.startswith("torch.nn"):  # torch's own layers keep nothing but buffers
            if module._buffers:
                self._holders.append(Attributes(module._buffers))
        else:
            self._holders.append(Attributes(module._buffers))
            self._holders.append(Attributes(module.__dict__, SKIPPED_ATTRIBUTES))
            for name, item in list(module.__dict__.items()):
                if name not in SKIPPED_ATTRIBUTES and not name.endswith("_hooks"):
                    self._visit(item, depth + 1, seen)
        for child in module._modules.values():
            if child is not None:
                self._visit(child, 0, seen)


def _give_back(grads: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, grad in grads:
        p.grad = grad


def _versions(parameters: Iterable[nn.Parameter]) -> tuple[int, ...]:
    return tuple(p._version for p in parameters if not hasattr(p, "to_local"))


def _set_versions(tensors: tuple[Tensor, ...], versions: tuple[int, ...]) -> None:
    """What ``_unsafe_preserve_version_counter`` does when it is left."""
    torch._C._autograd._unsafe_set_version_counter(tensors, versions)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def crafting_mode(layers: Iterable[nn.Module], root: nn.Module, mode: str) -> Iterator[None]:
    """Which behaviour of dropout and batch normalisation the attack sees; every flag is as before afterwards.

    Args:
        layers: the modules to look at. Only those without children are switched, never the modules that contain them:
            some models return another kind of output in eval mode.
        root: the LightningModule, which stays as it is.
        mode: ``"eval"``: no dropout, running statistics. ``"batch"``: no dropout, statistics of the batch, running
            statistics untouched. ``"train"``: everything as in training; what it updates is undone by the sandbox.
    """
    undo: list[tuple[nn.Module, str, Any]] = []

    def switch(layer: nn.Module, flag: str, value: Any) -> None:
        undo.append((layer, flag, getattr(layer, flag)))
        setattr(layer, flag, value)

    try:
        for layer in layers if mode != "train" else ():
            is_layer = next(layer.children(), None) is None or isinstance(layer, nn.MultiheadAttention)
            if layer is root or not is_layer or isinstance(layer, Metric):
                continue
            if isinstance(layer, nn.RNNBase) and any(p.is_cuda for p in layer.parameters()):
                switch(layer, "dropout", 0.0)  # cuDNN differentiates recurrent layers in training mode only
                switch(layer, "training", True)
            elif layer.training and mode == "batch" and isinstance(layer, _BatchNorm):
                switch(layer, "track_running_stats", False)
            elif layer.training:
                switch(layer, "training", False)
        yield
    finally:
        for layer, flag, value in reversed(undo):
            setattr(layer, flag, value)
