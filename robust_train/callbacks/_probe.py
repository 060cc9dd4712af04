"""The user's training step, as the preflight checks of DP-SGD call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_train.callbacks import _seams
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import loss_of
from robust_train.privacy.clipping.flat import Flat
from robust_train.privacy.engines.base import Engine
from robust_train.privacy.preflight import GuaranteeVoid, Probe, check


class StepProbe(Probe):
    """Calls the step on collated samples, in full precision, in the mode it trains in, and leaves no trace.

    Args:
        trainer: whose precision and device are used.
        module: the user's LightningModule.
        collate: the train loader's.
        engine: attached to the module.
    """

    def __init__(self, trainer: Any, module: Any, collate: Callable[[list[Any]], Any], engine: Engine) -> None:
        self._trainer, self._module, self._collate, self._engine = trainer, module, collate, engine
        self._step = module.training_step

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are trained, by their names."""
        names = {p: name for name, p in self._module.named_parameters()}
        return {names[p]: p for p in self._engine.parameters}

    @property
    def where(self) -> str:
        function = inspect.unwrap(getattr(self._step, "__func__", self._step))
        try:
            line = inspect.getsourcelines(function)[1]
            return f"training_step ({Path(inspect.getfile(function)).name}:{line})"
        except (OSError, TypeError):
            return "training_step"

    def per_example(self, samples: Sequence[Any], seed: int, weights: Tensor | None = None) -> list[Tensor]:
        weights = None if weights is None else weights.to(self._module.device)

        def recorded(loss: Callable[[], Tensor]) -> list[Tensor]:
            self._engine.start()
            try:
                value = loss()
                self._engine.arm()
                value.backward()
                return self._engine.clipped_sum(len(samples), float("inf"), Flat(), weights=weights).gradients
            finally:
                self._engine.stop()

        return self._run(samples, seed, recorded)

    def plain(self, samples: Sequence[Any], seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        def differentiated(loss: Callable[[], Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
            with self._engine.paused():
                grads = torch.autograd.grad(loss(), self._engine.parameters, allow_unused=True)
            found = [
                torch.zeros_like(p) if g is None else g.detach()
                for p, g in zip(self._engine.parameters, grads, strict=True)
            ]
            kept = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
            state = self._module.state_dict()
            return found, {k: v.detach().clone() for k, v in state.items() if k not in kept and isinstance(v, Tensor)}

        return self._run(samples, seed, differentiated)

    def first_rows(self, samples: Sequence[Any], seed: int) -> list[tuple[str, Tensor, Tensor]]:
        found: list[tuple[str, Tensor, Tensor]] = []

        def watched(loss: Callable[[], Tensor]) -> list[tuple[str, Tensor, Tensor]]:
            with ExitStack() as stack:
                stack.enter_context(self._engine.paused())
                for name, child in self._module.named_modules():
                    if next(child.children(), None) is None:
                        label = f"{name!r} ({type(child).__name__})"
                        hook = child.register_forward_hook(lambda m, args, output, n=label: note(n, args, output))
                        stack.callback(hook.remove)
                loss()
            return found

        def note(name: str, args: tuple[Any, ...], output: Any) -> None:
            rows = [t[0].detach().clone() for t in (*args[:1], output) if isinstance(t, Tensor) and t.ndim]
            if len(rows) == 2 and len(output) == len(samples):
                found.append((name, rows[0], rows[1]))

        return self._run(samples, seed, watched)

    def _run(self, samples: Sequence[Any], seed: int, work: Callable[[Callable[[], Tensor]], Any]) -> Any:
        module = self._module
        sandbox = Sandbox(module, self._trainer, module.device)

        def step() -> Any:
            torch.manual_seed(seed)  # of collating, of augmentation and of random layers
            batch = _seams.transferred(self._trainer, self._collate(list(samples)))
            return work(lambda: self._loss(module, batch))

        with torch.enable_grad(), sandbox.opened("train", frozen_parameters=False, pausing=False):
            try:
                found = sandbox.call(step)
            finally:
                for p in module.parameters():
                    p.grad = None
        if sandbox.drew_from_iterators:
            raise GuaranteeVoid(
                f"{self.where} draws examples from an iterator of the module's own, which no sampling accounts for. "
                "Put all training data into the dataset of the train loader"
            )
        return found

    def _loss(self, module: nn.Module, batch: Any) -> Tensor:
        loss = loss_of(self._step(batch, *_seams.step_arguments(self._step, 0, 0)))
        if loss is None:
            raise GuaranteeVoid(
                f"{self.where} returned no loss for a batch: a step that skips a batch because of one example lets it "
                "decide over the others. Return a loss for every batch"
            )
        return loss


def check_step(probe: StepProbe, pool: Sequence[Any]) -> None:
    """All preflight checks, with the tolerance that the parameters' precision asks for.

    Args:
        probe: the training step.
        pool: some of the dataset's samples.

    Raises:
        GuaranteeVoid: no epsilon would hold for this step.
    """
    tolerance = max(1e-3, *(20 * torch.finfo(p.dtype).eps for p in probe.parameters.values()))
    check(probe, pool, list(probe.parameters), tolerance)
