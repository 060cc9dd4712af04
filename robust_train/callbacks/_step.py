"""The user's own step as the model under attack."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from robust_train.callbacks._batch import Path, fresh, get, replaced, take, write_back
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._seams import LogitsReached, backpropagated, on_call, uncompiled_modules
from robust_train.evasion.gradients import LossScale
from robust_train.evasion.threat import Threat
from robust_train.evasion.victim import Victim, as_logits, classification_loss, is_classification

LOGITS_KEYS = ("logits", "out")  # where libraries put them when a model returns more than a tensor


def batch_and_call(
    step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """The batch that a step was handed, by place or by name, and the same call with another batch."""
    name = None if args else next(iter(kwargs))
    batch = args[0] if name is None else kwargs[name]

    def call(other: Any) -> Any:
        return step(other, *args[1:], **kwargs) if name is None else step(**{**kwargs, name: other})

    return batch, call


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned: a tensor, a dict with ``"loss"``, or None."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The training step's output with another loss in it."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def logits_in(output: Any) -> Tensor | None:
    """The scores in what a module returned, or None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim else None
    if isinstance(output, (tuple, list)) and not hasattr(output, "logits"):  # (logits, features, …)
        return logits_in(output[0]) if output else None
    if isinstance(output, Mapping):
        return next((logits_in(output[key]) for key in LOGITS_KEYS if key in output), None)
    return logits_in(getattr(output, "logits", None)) if hasattr(output, "logits") else None


class StepSkipped(Exception):  # noqa: N818
    """The user's training step returned None: there is no loss, and nothing to attack."""


@dataclass(frozen=True)
class Layout:
    """Where things are in the user's batch and module.

    Attributes:
        input_path: the attacked input in the batch.
        labels_path: the labels in the batch, or None.
        candidates: where labels may lie, the likeliest first, while it is not known.
        logits_module: the submodule whose output are the logits, or None where they are not needed or not known.
        logits_call: which of its calls within one step returns them, counted from 0.
        layer: the submodule whose output is attacked instead of the batch's input, or None.
        layer_name: its name, for messages.
    """

    input_path: Path
    labels_path: Path | None
    logits_module: nn.Module | None = None
    logits_call: int = 0
    candidates: tuple[Path, ...] = ()
    layer: nn.Module | None = None
    layer_name: str = ""

    @contextmanager
    def watched(self, seen: Callable[[Tensor], None]) -> Iterator[None]:
        """Inside, ``seen(logits)`` is called when a step has computed its logits; never where they are not known."""
        if self.logits_module is None:
            yield
            return
        calls = [0]

        def leave(_: nn.Module, output: Any) -> None:
            calls[0] += 1
            if calls[0] == self.logits_call + 1 and (logits := logits_in(output)) is not None:
                seen(logits)

        with on_call(self.logits_module, leave):
            yield


class StepVictim(Victim):
    """A step of an unmodified LightningModule, seen from its inputs.

    Args:
        module: the LightningModule.
        step: takes a batch, returns what the user's step returns.
        batch: the batch, never written to.
        layout: where input, labels and logits are.
        sandbox: keeps extra calls from leaving a trace.
        mode: behaviour of dropout and batch normalisation, see ``crafting_mode``.
        own_loss: attack the step's own loss; otherwise the cross-entropy of its logits.
        gradient_scale: see ``Victim``.
        stop_when_fooled: see ``Victim``.
    """

    def __init__(
        self,
        module: Any,
        step: Callable[[Any], Any],
        batch: Any,
        layout: Layout,
        sandbox: Sandbox,
        *,
        mode: str = "eval",
        own_loss: bool = True,
        gradient_scale: float = 1.0,
        stop_when_fooled: bool = False,
    ) -> None:
        self._module, self._step, self.batch, self._sandbox = module, step, batch, sandbox
        self.layout, self._mode, self._own_loss, self.gradient_scale = layout, mode, own_loss, gradient_scale
        self.found_scale = LossScale(gradient_scale, fixed=_among_others())
        self.labels = None if layout.labels_path is None else get(batch, layout.labels_path)
        self.stop_when_fooled = stop_when_fooled
        provides = {"loss"}
        if layout.logits_module is not None:
            provides |= {"logits"} | ({"labels"} if self.labels is not None else set())
            provides |= set() if own_loss else {"per_example_loss"}
        self.provides = frozenset(provides)
        self._frozen, self._open = True, False

    def training(self) -> StepVictim:
        """The same step in training mode, with gradients to the parameters: for an objective's own part of the loss."""
        other = copy.copy(self)
        other._mode, other._frozen, other._open = "train", False, False
        return other

    def loss(self, x: Tensor) -> Tensor:
        return self._own(x) if self._own_loss else self.loss_and_logits(x)[0]

    def clean(self) -> Tensor:
        """The inputs ``(B, ...)`` that are attacked, as they are without an attack."""
        return get(self.batch, self.layout.input_path)

    def within(self, threat: Threat) -> Threat:
        """The threat as it holds for this batch."""
        return threat

    @contextmanager
    def trained_on(self, x: Tensor) -> Iterator[Any]:
        """For the real call: the batch with ``x`` in it; what the step writes into the batch reaches the user's own."""
        batch = replaced(self.batch, self.layout.input_path, x)
        try:
            yield batch
        finally:
            write_back(self.batch, batch, self.layout.input_path, x)

    def output(self, x: Tensor) -> Any:
        """Whatever the step returns."""

        def call() -> Any:
            with backpropagated(self._module), self._sent(x) as batch:
                return self._step(batch)

        return self._called(call)

    def logits(self, x: Tensor) -> Tensor:
        module = self.layout.logits_module
        if module is None:
            return super().logits(x)

        def cut(logits: Tensor) -> None:
            raise LogitsReached(logits)

        def call() -> Tensor:
            try:
                with self.layout.watched(cut), backpropagated(self._module), self._sent(x) as batch:
                    output = self._step(batch)
            except LogitsReached as reached:
                return reached.logits
            if loss_of(output) is None:
                raise StepSkipped
            raise ValueError(
                f"the step did not call {type(module).__name__}, whose output were to be the logits; name the "
                'submodule that returns them with logits="…"'
            )

        return as_logits(self._called(call))

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return (self._own(x) if self._own_loss else classification_loss(logits, self.known_labels())), logits

    def take(self, index: Tensor) -> StepVictim:
        return self._with_batch(take(self.batch, index, len(self.clean())))

    def relabelled(self, labels: Tensor) -> StepVictim:
        if self.layout.labels_path is None:
            return super().relabelled(labels)  # type: ignore[return-value]
        return self._with_batch(replaced(self.batch, self.layout.labels_path, labels))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        if self._open:  # parts of a victim are made inside
            yield
            return
        with self._sandbox.opened(self._mode, self._frozen):
            self._open = True
            try:
                yield
            finally:
                self._open = False

    def network(self) -> nn.Module:
        return self._module

    @contextmanager
    def reseeded(self, seed: int) -> Iterator[None]:
        with self._sandbox.reseeded(seed):
            yield

    def _own(self, x: Tensor) -> Tensor:
        """The step's own loss."""

        def call() -> Tensor:
            with backpropagated(self._module) as handed, self._sent(x) as batch:
                output = self._step(batch)
            if handed:  # manual optimization: all that the step backpropagates
                return torch.stack([loss.reshape(()) for loss in handed]).sum()
            if not self._module.automatic_optimization and x.grad is not None:
                raise ValueError(
                    "the training step calls loss.backward() itself; in manual optimization call "
                    "self.manual_backward(loss), as Lightning asks, so that the loss can be attacked"
                )
            loss = loss_of(output)
            if loss is None or not self._module.automatic_optimization:
                raise StepSkipped
            return loss

        return self._called(call)

    def _called(self, call: Callable[[], Any]) -> Any:
        with self.undisturbed():
            return self._sandbox.call(call)

    @contextmanager
    def _sent(self, x: Tensor) -> Iterator[Any]:
        """For an extra call: a batch with ``x`` in it that the user's code may write into."""
        yield replaced(fresh(self.batch), self.layout.input_path, x.clone())

    def _with_batch(self, batch: Any) -> StepVictim:
        other = copy.copy(self)
        other.batch = batch
        other.labels = None if self.layout.labels_path is None else get(batch, self.layout.labels_path)
        return other


def _among_others() -> bool:
    """Whether other processes may wait for this one in a forward pass."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def find_logits(victim: StepVictim, root: nn.Module, named: nn.Module | None = None) -> Layout | None:
    """Whose output are the logits of a classification: run the step once and watch.

    Args:
        victim: the step; its layout has the candidates for the labels.
        root: the LightningModule.
        named: the submodule that the user named, if so.

    Returns:
        The victim's layout with the call found: of the module named, or else of the LightningModule itself where the
        step calls ``self(...)``, or else of the last of its outermost modules whose output fits the labels. Where a
        module is called several times, the first call that the attacked input reaches. None where nothing fits, because
        the task has no classes.

    Raises:
        StepSkipped: the step returned before it called anything.
        ValueError: the step does not call the module named, or its output fits no labels.
    """
    depth, calls, found, candidates = [0], Counter(), [], victim.layout.candidates

    def enter() -> None:
        depth[0] += 1

    def leave(module: nn.Module, output: Any) -> None:
        depth[0] -= 1
        call = calls[module]
        calls[module] += 1
        logits = logits_in(output)
        if logits is None or (named is None and depth[0] > 0):
            return
        fits = [p for p in candidates if is_classification(logits, get(victim.batch, p))]
        if fits or (module is named and not candidates):
            found.append((logits.requires_grad, module, call, fits[0] if fits else None))

    modules = [named] if named is not None else dict.fromkeys(uncompiled_modules(root))
    x = victim.clean().detach()  # before the hooks, because it may cut a call short
    with ExitStack() as stack:
        for module in modules:
            if not isinstance(module, Metric):
                stack.enter_context(on_call(module, leave, enter))
        # parameters are frozen meanwhile: what requires gradients depends on the input
        output = victim.output(x.requires_grad_(True) if x.is_floating_point() else x)
    if not calls and loss_of(output) is None:
        raise StepSkipped
    if named is not None and not found:
        raise ValueError(
            f"logits: the step does not call {type(named).__name__}, or what it returns does not fit the labels "
            f"(candidates: {', '.join('.'.join(map(str, p)) for p in candidates) or 'none'}); name them with labels=…"
        )
    reached = [place for place in found if place[0]] or found
    own = [place for place in reached if place[1] is root]
    if not reached:
        return None
    _, module, call, labels_path = own[0] if own else next(p for p in reached if p[1] is reached[-1][1])
    return replace(victim.layout, logits_module=module, logits_call=call, labels_path=labels_path)
