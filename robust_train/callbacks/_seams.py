"""Every use of what Lightning does not promise, each with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn


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
def before_backward(module: Any, total: Callable[[Tensor, bool], Tensor]) -> Iterator[None]:
    """In manual optimization: ``total(loss, first)`` is what ``manual_backward(loss)`` backpropagates."""
    backward, calls = module.manual_backward, []

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        calls.append(loss)
        backward(total(loss, len(calls) == 1), *args, **kwargs)

    with patched(module, manual_backward=manual_backward):
        yield


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


def exchange_train_loader(trainer: Any, exchange: Callable[[Any], Any]) -> Callable[[], None]:
    """Put ``exchange(loader)`` in place of the train loader, wherever it comes from; returns what undoes it.

    Lightning has no hook for it: by ``on_fit_start`` the loader may have been asked for already (by
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers``).
    """
    fit_loop = trainer.fit_loop
    source = fit_loop._data_source
    request = source.dataloader
    source.dataloader = lambda: exchange(request())
    fit_loop._combined_loader = None  # an earlier fit's, which would be used again

    def undo() -> None:
        source.__dict__.pop("dataloader", None)
        fit_loop._combined_loader = None

    return undo


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
