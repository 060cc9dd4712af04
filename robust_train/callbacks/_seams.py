"""Every use of what Lightning does not promise, each with the reason."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import count
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.data import _dataloader_init_kwargs_resolve_sampler
from torch import Tensor, nn

from robust_train.callbacks._state import (
    LONGEST_CONTAINER,
    SKIPPED_PACKAGES,
    generator_state,
    is_generator,
    set_generator_state,
)


@contextmanager
def patched(target: Any, **attributes: Any) -> Iterator[None]:
    """Instance attributes for the duration; the instance's ``__dict__`` is as before afterwards."""
    namespace, missing = target.__dict__, object()
    old = {name: namespace.get(name, missing) for name in attributes}
    namespace.update(attributes)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is missing:
                namespace.pop(name, None)
            else:
                namespace[name] = value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for what an extra call must not do."""


def _closure_only(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
    """An optimizer's step that changes nothing; a closure is run, because the loss is in there."""
    return None if closure is None else closure()


class IdleOptimizer:
    """Reads like the user's optimizer and changes nothing."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    step = staticmethod(_closure_only)
    zero_grad = add_param_group = load_state_dict = staticmethod(_nothing)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield


class IdleScheduler:
    """Reads like the user's learning-rate scheduler and does not step."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    step = staticmethod(_nothing)


def _idle(found: Any, idle: type) -> Any:
    if found is None:
        return None
    return [idle(item) for item in found] if isinstance(found, list) else idle(found)


class IdleLogger(DummyLogger):
    """Says where the user's logger writes, and writes nothing."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> Any:
        return self._logger.name

    @property
    def version(self) -> Any:
        return self._logger.version

    @property
    def save_dir(self) -> Any:
        return self._logger.save_dir

    @property
    def root_dir(self) -> Any:
        return getattr(self._logger, "root_dir", self.save_dir)

    @property
    def log_dir(self) -> Any:
        return getattr(self._logger, "log_dir", self.save_dir)


@contextmanager
def silenced(module: Any, trainer: Any) -> Iterator[None]:
    """Inside, the module logs to nobody, and in manual optimization steps nothing.

    ``trainer.loggers`` is exchanged because steps write to ``self.logger.experiment`` directly. In manual optimization
    the step's own optimizer calls are made idle; what it hands to ``manual_backward`` is collected by
    ``backpropagated``.
    """
    attributes: dict[str, Any] = {"log": _nothing, "log_dict": _nothing, "print": _nothing}
    if not module.automatic_optimization:
        optimizers, schedulers = module.optimizers, module.lr_schedulers
        attributes |= {
            "optimizers": lambda *args, **kwargs: _idle(optimizers(*args, **kwargs), IdleOptimizer),
            "lr_schedulers": lambda: _idle(schedulers(), IdleScheduler),
            "toggle_optimizer": _nothing,
            "untoggle_optimizer": _nothing,
            "clip_gradients": _nothing,
        }
    loggers = list(trainer.loggers)
    with ExitStack() as stack:
        stack.enter_context(patched(module, **attributes))
        for optimizer in trainer.optimizers:  # also reached past self.optimizers()
            stack.enter_context(patched(optimizer, step=_closure_only, zero_grad=_nothing))
        if loggers:
            stack.callback(setattr, trainer, "loggers", loggers)
            trainer.loggers = [IdleLogger(logger) for logger in loggers]
        yield


@contextmanager
def backpropagated(module: Any) -> Iterator[list[Tensor]]:
    """Collects what a manual-optimization step hands to ``manual_backward``, and backpropagates nothing."""
    losses: list[Tensor] = []
    with patched(module, manual_backward=lambda loss, *args, **kwargs: losses.append(loss)):
        yield losses


class LogitsReached(BaseException):
    """Cuts an extra call short once the logits are there. Not an ``Exception``: user code must not swallow it."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = logits


@contextmanager
def on_call(
    module: nn.Module, leave: Callable[[nn.Module, Any], None], enter: Callable[[], None] = _nothing
) -> Iterator[None]:
    """Calls ``enter()`` before and ``leave(module, output)`` after each call of ``module``.

    ``Module.compile()`` puts a compiled function into the private ``_compiled_call_impl``, inside which forward hooks
    would be compiled too; there the compiled function itself is wrapped.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        before = module.register_forward_pre_hook(lambda m, args: enter())
        after = module.register_forward_hook(lambda m, args, output: leave(m, output))
        try:
            yield
        finally:
            before.remove()
            after.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        enter()
        output = compiled(*args, **kwargs)
        leave(module, output)
        return output

    with patched(module, _compiled_call_impl=call):
        yield


@contextmanager
def output_changed(module: nn.Module, change: Callable[[tuple[Any, ...], Any], Any]) -> Iterator[None]:
    """Each call of ``module`` returns ``change(arguments, output)``; compiled modules as in ``on_call``."""
    compiled = module._compiled_call_impl
    if compiled is None:
        handle = module.register_forward_hook(lambda m, args, output: change(args, output))
        try:
            yield
        finally:
            handle.remove()
        return
    with patched(module, _compiled_call_impl=lambda *args, **kwargs: change(args, compiled(*args, **kwargs))):
        yield


def checkpointing() -> bool:
    """Whether what runs now runs in activation checkpointing, which runs it again in the backward pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    return hooks is not None and "checkpoint" in hooks[0].__qualname__


def uncompiled_modules(root: nn.Module) -> Iterator[nn.Module]:
    """``root`` and what lies below it, down to modules that are compiled: hooks further inside would recompile them."""
    yield root
    if root._compiled_call_impl is None and type(root).__name__ != "OptimizedModule":
        for child in root.children():
            yield from uncompiled_modules(child)


def wrap_training_step(module: Any, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Put ``wrapper(step, *args, **kwargs)`` in place of the module's ``training_step``; returns what undoes it.

    An instance attribute is honoured by Lightning inside autocast and inside ``DistributedDataParallel.forward``, and
    no key of the checkpoint changes. Lightning inspects the signature through ``__wrapped__``, one level deep.
    """
    step = module.training_step
    own = module.__dict__.get("training_step")

    def training_step(*args: Any, **kwargs: Any) -> Any:
        return wrapper(step, *args, **kwargs)

    training_step.__wrapped__ = step  # type: ignore[attr-defined]
    training_step.__name__, training_step.__doc__ = "training_step", step.__doc__
    module.__dict__["training_step"] = training_step

    def undo() -> None:
        if own is None:
            module.__dict__.pop("training_step", None)
        else:  # torch.compile(LightningModule) had put its own there
            module.__dict__["training_step"] = own

    return undo


@contextmanager
def before_backward(
    module: Any, total: Callable[[Tensor, bool], Tensor], then: Callable[[], Any] = _nothing
) -> Iterator[None]:
    """In manual optimization: ``manual_backward(loss)`` backpropagates ``total(loss, first)`` and calls ``then()``."""
    backward, calls = module.manual_backward, []

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        calls.append(loss)
        backward(total(loss, len(calls) == 1), *args, **kwargs)
        then()

    with patched(module, manual_backward=manual_backward):
        yield


def own_step(module: Any) -> Callable[..., Any]:
    """The training step as the user wrote it, below what our callbacks put around it."""
    step = module.__dict__.get("training_step", module.training_step)
    while isinstance(step, FunctionType) and "__wrapped__" in step.__dict__:  # see wrap_training_step
        step = step.__dict__["__wrapped__"]
    return step


def takes_iterator(module: Any) -> bool:
    """Whether the training step fetches its own batches (Lightning hands such a step an iterator)."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters


def step_arguments(step: Callable[..., Any], batch_idx: int, loader_idx: int) -> tuple[int, ...]:
    """What Lightning would pass to an evaluation step after the batch, as far as the step takes it."""
    names = list(inspect.signature(step).parameters)
    if "dataloader_idx" in names:
        return (batch_idx, loader_idx)
    return (batch_idx,) if len(names) > 1 else ()


def autocast_context(trainer: Any, stage: str) -> Any:
    """The precision plugin's context, which Lightning opens around the user's step but not around callbacks' hooks."""
    plugin = trainer.precision_plugin
    return plugin.test_step_context() if stage == "test" else plugin.val_step_context()


def gradient_scale(trainer: Any) -> float:
    """Factor against gradients that underflow in fp16: an input's share of a mean loss is tiny. 1 elsewhere."""
    return 2.0**16 if str(trainer.precision).startswith("16") else 1.0


def data_rank(trainer: Any) -> int:
    """Which share of the data this process sees; ranks of one tensor-parallel group see the same batch."""
    sampler = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return int(sampler["rank"]) if sampler else trainer.global_rank


def sharded(trainer: Any) -> bool:
    """Whether a forward pass is a collective operation, so that every rank must make equally many."""
    return any(hasattr(m, "set_requires_gradient_sync") for m in trainer.lightning_module.modules()) and (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )


UNSUPPORTED_STRATEGIES = {
    "FSDPStrategy": "it was never tested with extra passes; use ModelParallelStrategy with fully_shard, or ddp",
    "DeepSpeedStrategy": "its engine owns the backward pass; use ddp, or ModelParallelStrategy with fully_shard",
    "XLAStrategy": "it was never tested; use a CPU or GPU accelerator",
    "SingleDeviceXLAStrategy": "it was never tested; use a CPU or GPU accelerator",
}


def unsupported_strategy(trainer: Any) -> str | None:
    """Name and reason when the Trainer's strategy cannot work, else None. By name: both Lightning packages have one."""
    for cls in type(trainer.strategy).__mro__:
        if cls.__name__ in UNSUPPORTED_STRATEGIES:
            return f"strategy {cls.__name__}: {UNSUPPORTED_STRATEGIES[cls.__name__]}"
    return None


# --- DP-SGD -------------------------------------------------------------------------------------------------------


def exchange_train_loader(trainer: Any, exchange: Callable[[Any], Any], order: int = 1) -> Callable[[], None]:
    """Put ``exchange(loader)`` in place of the train loader, wherever it comes from; returns what undoes it.

    Lightning has no hook for it: by ``on_fit_start`` the loader may have been asked for already (by
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers``).

    Args:
        trainer: whose loader.
        exchange: takes what ``train_dataloader()`` returned, or what an exchange before it made of that.
        order: exchanges are made in ascending order of this number, whoever came first: poison is simulated (0) before
            it is filtered (1), and what remains is sampled (2).
    """
    fit_loop = trainer.fit_loop
    source = fit_loop._data_source
    if "exchanges" not in source.__dict__:
        request = source.dataloader
        source.exchanges, source.request = [], request
        source.dataloader = lambda: train_loader_before(trainer)
    mine = (order, exchange)
    source.exchanges.append(mine)
    source.exchanges.sort(key=lambda entry: entry[0])
    fit_loop._combined_loader = None  # an earlier fit's, which would be used again

    def undo() -> None:
        source.exchanges.remove(mine)
        if not source.exchanges:
            for name in ("exchanges", "request", "dataloader"):
                source.__dict__.pop(name, None)
        fit_loop._combined_loader = None

    return undo


def train_loader_before(trainer: Any, order: float = float("inf")) -> Any:
    """What ``train_dataloader()`` returns, after the exchanges that come before ``order``."""
    source = trainer.fit_loop._data_source
    loaders = source.__dict__.get("request", source.dataloader)()
    for at, exchange in source.__dict__.get("exchanges", ()):
        if at < order:
            loaders = exchange(loaders)
    return loaders


def stop_after(trainer: Any, steps: int) -> Callable[[], None]:
    """Let no fit go beyond ``global_step == steps``, whatever ``min_epochs`` says; returns what undoes it.

    ``trainer.should_stop`` gives way to ``min_epochs`` and ``min_steps``; ``max_steps`` does not.
    """
    loop = trainer.fit_loop.epoch_loop
    before = loop.max_steps
    loop.max_steps = steps if before == -1 else min(before, steps)

    def undo() -> None:
        loop.max_steps = before

    return undo


def micro_batches_begun(trainer: Any) -> int:
    """Batches of the running epoch that the loop counts as begun; restored with a checkpoint."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def transferred(trainer: Any, batch: Any) -> Any:
    """A batch as the training loop hands it to the step: precision, hooks of the module and data module, device."""
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# --- data validation ----------------------------------------------------------------------------------------------


def exchange_batches(trainer: Any, exchange: Callable[[Any, int], Any]) -> Callable[[], None]:
    """Put ``exchange(batch, dataloader_idx)`` in place of each batch that a loop fetches; returns what undoes it.

    The strategy's transfer is the last to touch a batch before the first hook sees it, wherever the module or the data
    module changes it on the way; no hook of a callback can put another batch in its place.
    """
    strategy = trainer.strategy
    transfer = strategy.batch_to_device

    def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
        return exchange(transfer(batch, *args, **kwargs), kwargs.get("dataloader_idx", 0))

    strategy.__dict__["batch_to_device"] = batch_to_device

    def undo() -> None:
        strategy.__dict__.pop("batch_to_device", None)

    return undo


def fetches_training_batch(trainer: Any) -> bool:
    """Whether a batch that is being transferred now is training's next one, and not an extra one (``transferred``)."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.training and progress.ready == progress.completed


def leave_out_step(module: Any) -> Callable[[], None]:
    """No call of the training step reaches the module, as if it had returned None; returns what undoes it."""
    if getattr(module.__dict__.get("training_step"), "left_out", False):
        return _nothing

    def nothing(step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        return None

    undo = wrap_training_step(module, nothing)
    module.__dict__["training_step"].left_out = True
    return undo


# --- data filtering -----------------------------------------------------------------------------------------------
# To put a DistributedSampler in, or for overfit_batches, Lightning makes the user's loader anew: from the constructor's
# arguments, which it noted on every loader and BatchSampler that a *_dataloader hook made, or from the attributes.


def remember_dataset(loader: Any, dataset: Any) -> None:
    """Have Lightning make ``loader``, which is a copy, anew on ``dataset`` instead of on its own.

    A class that makes its dataset itself would bring the whole dataset back: Lightning is kept from making it anew.
    """
    notes = loader.__dict__
    if "__pl_saved_args" not in notes:
        return
    names, args, kwargs = notes["__pl_saved_arg_names"], notes["__pl_saved_args"], notes["__pl_saved_kwargs"]
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("dataset") is not loader.dataset:
        notes["__pl_saved_kwargs"] = _NotAnew(type(loader).__name__)
        return
    notes["__pl_saved_args"] = tuple(dataset if arg is loader.dataset else arg for arg in args)
    notes["__pl_saved_kwargs"] = kwargs | ({"dataset": dataset} if "dataset" in kwargs else {})
    notes["__dataset"] = dataset


class _NotAnew(dict[str, Any]):
    """Arguments of a loader that Lightning must not make anew, which it begins by changing the sampler among them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{self._name} makes its dataset itself, which brings the dropped rows back when Lightning makes the train "
            "loader anew, for several processes or for overfit_batches: let it take the dataset as an argument, or put "
            "your own DistributedSampler in and set Trainer(use_distributed_sampler=False)"
        )


def remember_arguments(batch_sampler: Any, **arguments: Any) -> None:
    """Have Lightning make a batch sampler of ours anew with ``arguments`` and, as ``sampler``, a process's share."""
    batch_sampler.__dict__ |= {
        "__pl_saved_args": (),
        "__pl_saved_kwargs": arguments,
        "__pl_saved_default_kwargs": {"sampler": None},
        "__pl_saved_arg_names": (),
    }


def batch_sampler_on(batch_sampler: Any, sampler: Any) -> Any:
    """The user's batch sampler made anew, to draw from ``sampler``, as Lightning does it for several processes.

    Raises:
        TypeError: it takes no sampler; Lightning's own message says what to do.
    """
    loader: Any = SimpleNamespace(batch_sampler=batch_sampler)  # nothing else of a loader is read
    return _dataloader_init_kwargs_resolve_sampler(loader, sampler)["batch_sampler"]


def leaves_of(loaders: Any) -> list[Any] | None:
    """The loaders in a ``CombinedLoader``; None if it is none. By name: both Lightning packages have one."""
    if any(cls.__name__ == "CombinedLoader" for cls in type(loaders).__mro__):
        return loaders.flattened
    return None


def exchange_prepared_loader(trainer: Any, exchange: Callable[[Any], Any]) -> Callable[[], None]:
    """Put ``exchange(loader)`` in place of each train loader that Lightning has prepared; returns what undoes it.

    That is after it put in a ``DistributedSampler`` and before it begins the first pass, for which every public hook
    is too early or too late.
    """
    fit_loop, strategy = trainer.fit_loop, trainer.strategy
    setup_data = fit_loop.setup_data

    def setup_data_exchanging() -> None:
        process = strategy.process_dataloader  # another exchange may have been put around it
        with patched(strategy, process_dataloader=lambda loader: exchange(process(loader))):
            setup_data()

    fit_loop.setup_data = setup_data_exchanging

    def undo() -> None:
        fit_loop.__dict__.pop("setup_data", None)

    return undo


def once_restored(trainer: Any, then: Callable[[], None]) -> Callable[[], None]:
    """Call ``then()`` once checkpoint and callbacks are restored and before the optimizers are made; returns the undo.

    ``setup`` is too early: whether the run resumes, and with what state, is not known yet. ``on_fit_start`` is too
    late: ``configure_optimizers`` may have asked for the number of batches.
    """
    connector = trainer._checkpoint_connector
    restore = connector._restore_modules_and_callbacks

    def undo() -> None:
        connector.__dict__.pop("_restore_modules_and_callbacks", None)

    def restoring(*args: Any, **kwargs: Any) -> None:
        restore(*args, **kwargs)
        undo()
        then()

    connector._restore_modules_and_callbacks = restoring
    return undo


def detached_copy(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a LightningModule that belongs to no Trainer, with steps of its own.

    A callback that wraps ``training_step``, and ``torch.compile(LightningModule)``, leave a function in the instance
    that would call the module itself.

    Args:
        module: the user's.
        memo: of ``copy.deepcopy``, filled here: what became of which object.
    """
    compiled = module.__dict__.get("_compiler_ctx") is not None
    # _metric_attributes: Lightning's notes on which metric is which, by identity
    with patched(module, _trainer=None, _fabric=None, _compiler_ctx=None, _metric_attributes=None):
        new = copy.deepcopy(module, memo)
    step = own = module.__dict__.get("training_step")
    while isinstance(own, FunctionType) and "__wrapped__" in own.__dict__:  # see wrap_training_step
        own = own.__dict__["__wrapped__"]
    if compiled:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            new.__dict__.pop(name, None)
    elif own is not step:
        new.__dict__["training_step"] = MethodType(own.__func__, new) if isinstance(own, MethodType) else own
    return new


def data_for(trainer: Any, loader: Any) -> dict[str, Any]:
    """``fit``'s arguments for another loader, with the hooks of the user's data module around each batch."""
    if trainer.datamodule is None:
        return {"train_dataloaders": loader}
    data = copy.copy(trainer.datamodule)
    idle = dict.fromkeys(("prepare_data", "setup", "teardown", "val_dataloader"), _nothing)
    data.__dict__ |= {**idle, "train_dataloader": lambda: loader}
    return {"datamodule": data}


PATIENCE = 10  # seconds for which a process that fails waits for the others to learn of it
_turns = count()  # of waiting; all processes count alike


def wait_for_first(trainer: Any, work: Callable[[], Any]) -> Any:
    """What ``work()`` returns on the first process, known to all; the others wait for it without a time limit.

    A collective operation would run into the process group's time-out while the first process trains a probe; a store
    can be asked again and again. Inside ``work``, torch knows of the first process only.
    """
    if trainer.world_size == 1:
        return work()
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"robust_train/{next(_turns)}"
    if trainer.is_global_zero:
        try:
            with _alone():
                found, error = work(), ""
        except BaseException as e:
            store.set(key, f"{type(e).__name__}: {e}")
            until = time.monotonic() + PATIENCE  # the store ends with this process
            while store.add(f"{key}/told", 0) < trainer.world_size - 1 and time.monotonic() < until:
                time.sleep(0.05)
            raise
        store.set(key, error)
    else:
        while not store.check([key]):
            time.sleep(0.2)
        if error := store.get(key).decode():
            store.add(f"{key}/told", 1)
            raise RuntimeError(f"the first process failed: {error}")
        found = None
    return trainer.strategy.broadcast(found)


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, this process is the only one of its group: metrics of a nested run would wait for the others forever."""
    group, world = torch.distributed.GroupMember, torch.distributed.GroupMember.WORLD
    own: Any = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    group.WORLD = own  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        group.WORLD = world  # pyright: ignore[reportAttributeAccessIssue]
        torch.distributed.destroy_process_group(own)


def trainer_class(trainer: Any) -> Any:
    """Lightning's own Trainer, of the package that the user's comes from; a subclass may take other arguments."""
    homes = ("pytorch_lightning.trainer.trainer", "lightning.pytorch.trainer.trainer")
    return next(cls for cls in type(trainer).__mro__ if cls.__module__ in homes)


def single_process_environment(trainer: Any) -> Any:
    """For a nested Trainer, which must not take part in a cluster's requeueing and its checkpoints."""
    package = trainer_class(trainer).__module__.partition(".")[0]
    fabric = "lightning.fabric" if package == "lightning" else "lightning_fabric"
    return import_module(f"{fabric}.plugins.environments").LightningEnvironment()


def first_batch(loaders: Any) -> Any:
    """The first batch of several train loaders together, as the training loop puts it together."""
    combined = loaders if leaves_of(loaders) is not None else CombinedLoader(loaders, "max_size_cycle")
    try:
        return next(iter(combined))[0]
    finally:
        combined.reset()  # ends the workers


@contextmanager
def generators_kept(*holders: Any) -> Iterator[None]:
    """Generators that loaders, their samplers and datasets, and data modules hold are as before afterwards."""
    found: dict[int, tuple[Any, Any]] = {}
    seen: set[int] = set()
    queue = [leaves_of(holder) or holder for holder in holders]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if is_generator(item):
            found[id(item)] = item, generator_state(item)
        elif isinstance(item, MethodType):
            queue.append(item.__self__)
        elif isinstance(item, (dict, list, tuple)):
            if len(item) <= LONGEST_CONTAINER:
                queue += item.values() if isinstance(item, dict) else item
        elif isinstance(item, nn.Module) or _may_draw(item):
            queue += vars(item).values()
    try:
        yield
    finally:
        for generator, state in found.values():
            set_generator_state(generator, state)


def _may_draw(value: Any) -> bool:
    """Whether it is an object of the user's, or of torch's for data, with attributes."""
    package = type(value).__module__
    of_data = package.startswith("torch.utils.data") or package.partition(".")[0] not in SKIPPED_PACKAGES
    return of_data and hasattr(value, "__dict__") and not isinstance(value, (type, FunctionType, ModuleType))


def validation_dataset(trainer: Any) -> Any:
    """The dataset of the run's first validation loader, or None."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    found = source.dataloader() if source.is_defined() else None
    while (flat := leaves_of(found)) is not None or isinstance(found, (list, tuple, dict)):
        several: Any = list(found.values()) if isinstance(found, dict) else flat or found
        found = several[0] if several else None
    return getattr(found, "dataset", None)


def reload_train_loader(trainer: Any) -> None:
    """Have the loop ask for the train loader again before its next epoch."""
    trainer.fit_loop._combined_loader = None
