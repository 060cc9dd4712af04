"""The user's own step as the model under attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from robust_train.callbacks._batch import Path, fresh, get, replaced, take
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._seams import LogitsReached, backpropagated, on_call, uncompiled_modules
from robust_train.evasion.victim import Victim, as_logits, classification_loss, is_classification

LOGITS_KEYS = ("logits", "out")  # where libraries put them when a model returns more than a tensor


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
    if isinstance(output, Mapping):
        return next((logits_in(output[key]) for key in LOGITS_KEYS if key in output), None)
    return logits_in(getattr(output, "logits", None)) if hasattr(output, "logits") else None


def find_logits_module(
    call: Callable[[], Any], root: nn.Module, accept: Callable[[Tensor], bool]
) -> tuple[nn.Module, Tensor] | None:
    """Which module's output are the logits: run the step once and watch.

    Args:
        call: runs the step.
        root: the LightningModule.
        accept: whether an output looks like logits.

    Returns:
        The module and its output: the LightningModule itself where the step calls ``self(...)``, else the last of the
        outermost modules whose output is accepted. None where there is none.
    """
    depth, found = [0], {}

    def leave(module: nn.Module, output: Any) -> None:
        depth[0] -= 1
        logits = logits_in(output)
        if depth[0] == 0 and root not in found and logits is not None and accept(logits):
            found[module] = logits

    def enter() -> None:
        depth[0] += 1

    with ExitStack() as stack:
        for module in dict.fromkeys(uncompiled_modules(root)):
            if not isinstance(module, Metric):
                stack.enter_context(on_call(module, leave, enter))
        call()
    if not found:
        return None
    module = root if root in found else list(found)[-1]
    return module, found[module]


class StepVictim(Victim):
    """A step of an unmodified LightningModule, seen from its inputs.

    Args:
        module: the LightningModule.
        step: takes a batch, returns what the user's step returns.
        batch: the batch, never written to.
        input_path: where the attacked input lies.
        labels_path: where the labels lie, or None.
        sandbox: keeps extra calls from leaving a trace.
        mode: behaviour of dropout and batch normalisation, see ``crafting_mode``.
        logits_module: the submodule whose output are the logits, or None where they are not needed or not known.
        own_loss: attack the step's own loss; otherwise the cross-entropy of its logits.
        loss_scale: factor on the own loss against underflow in fp16.
        stop_when_fooled: see ``Victim``.
    """

    def __init__(
        self,
        module: Any,
        step: Callable[[Any], Any],
        batch: Any,
        input_path: Path,
        labels_path: Path | None,
        sandbox: Sandbox,
        *,
        mode: str = "eval",
        logits_module: nn.Module | None = None,
        own_loss: bool = True,
        loss_scale: float = 1.0,
        stop_when_fooled: bool = False,
    ) -> None:
        self._module, self._step, self._batch, self._sandbox = module, step, batch, sandbox
        self._input_path, self._labels_path, self._mode = input_path, labels_path, mode
        self._logits_module, self._own_loss, self._scale = logits_module, own_loss, loss_scale
        self.labels = None if labels_path is None else get(batch, labels_path)
        self.stop_when_fooled = stop_when_fooled
        provides = {"loss"}
        if logits_module is not None:
            provides |= {"logits"} | ({"labels"} if self.labels is not None else set())
            provides |= set() if own_loss else {"per_example_loss"}
        self.provides = frozenset(provides)
        self._frozen, self._open = True, False

    def training(self) -> StepVictim:
        """The same step in training mode, with gradients to the parameters: for an objective's own part of the loss."""
        return self._changed(mode="train", frozen=False)

    def loss(self, x: Tensor) -> Tensor:
        return self._own(x) if self._own_loss else self.loss_and_logits(x)[0]

    def output(self, x: Tensor) -> Any:
        """Whatever the step returns."""
        return self._called(lambda: self._step(self._batch_with(x)))

    def logits(self, x: Tensor) -> Tensor:
        module = self._logits_module
        if module is None:
            return super().logits(x)

        def reached(_: nn.Module, output: Any) -> None:
            raise LogitsReached(output)

        def call() -> Any:
            try:
                with on_call(module, reached):
                    self._step(self._batch_with(x))
            except LogitsReached as cut:
                return cut.logits
            raise ValueError(
                f"the step did not call {type(module).__name__}, whose output were to be the logits; name the submodule "
                'that returns them with logits="…"'
            )

        logits = logits_in(self._called(call))
        if logits is None:
            raise ValueError(
                f'{type(module).__name__} returned no tensor of logits; name the submodule with logits="…"'
            )
        return as_logits(logits)

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return (self._own(x) if self._own_loss else classification_loss(logits, self._known_labels())), logits

    def take(self, index: Tensor) -> StepVictim:
        size = len(get(self._batch, self._input_path))
        return self._changed(batch=take(self._batch, index, size))

    def relabelled(self, labels: Tensor) -> StepVictim:
        if self._labels_path is None:
            return super().relabelled(labels)  # type: ignore[return-value]
        return self._changed(batch=replaced(self._batch, self._labels_path, labels))

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

    def _own(self, x: Tensor) -> Tensor:
        """The step's own loss, scaled."""

        def call() -> Tensor:
            with backpropagated(self._module) as handed:
                output = self._step(self._batch_with(x))
            if handed:  # manual optimization: all that the step backpropagates
                return torch.stack([loss.reshape(()) for loss in handed]).sum()
            if not self._module.automatic_optimization and x.grad is not None:
                raise ValueError(
                    "the training step calls loss.backward() itself; in manual optimization call self.manual_backward(loss), "
                    "as Lightning asks, so that the loss can be attacked"
                )
            loss = loss_of(output)
            if loss is None or not self._module.automatic_optimization:
                raise StepSkipped
            return loss

        loss = self._called(call)
        return loss if self._scale == 1.0 else loss * self._scale

    def _called(self, call: Callable[[], Any]) -> Any:
        with self.undisturbed():
            return self._sandbox.call(call)

    def _batch_with(self, x: Tensor) -> Any:
        # a copy of x as well, so that the user's code may write into its input in place
        return replaced(fresh(self._batch), self._input_path, x.clone())

    def _changed(self, batch: Any = None, mode: str | None = None, frozen: bool | None = None) -> StepVictim:
        other = StepVictim(
            self._module,
            self._step,
            self._batch if batch is None else batch,
            self._input_path,
            self._labels_path,
            self._sandbox,
            mode=self._mode if mode is None else mode,
            logits_module=self._logits_module,
            own_loss=self._own_loss,
            loss_scale=self._scale if mode is None else 1.0,
            stop_when_fooled=self.stop_when_fooled,
        )
        other._frozen = self._frozen if frozen is None else frozen
        other._open = self._open if mode is None else False
        return other


class StepSkipped(Exception):  # noqa: N818
    """The user's training step returned None: there is no loss, and nothing to attack."""


def find_logits(victim_call: Callable[[], Any], module: nn.Module, labels: Any, size: int) -> nn.Module | None:
    """The module whose output are the logits of a classification, or None where the task has no classes."""

    def looks_right(logits: Tensor) -> bool:
        return logits.shape[0] == size and isinstance(labels, Tensor) and is_classification(logits, labels)

    found = find_logits_module(victim_call, module, looks_right)
    return None if found is None else found[0]
