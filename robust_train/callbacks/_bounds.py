"""The logits of a user's own step, bounded over a box of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from robust_train.callbacks import _seams
from robust_train.callbacks._batch import find_input, get, label_candidates
from robust_train.callbacks._callback import place_text, submodule
from robust_train.callbacks._sandbox import Sandbox
from robust_train.callbacks._step import Layout, StepSkipped, StepVictim, find_logits
from robust_train.evasion.certified.interval import Interval
from robust_train.evasion.certified.verifier import enclosing_box
from robust_train.evasion.threat import Threat


def find_class_layout(
    callback: Any, module: pl.LightningModule, call: Callable[[Any], Any], batch: Any, sandbox: Sandbox
) -> Layout:
    """Where input, labels and logits are in a step.

    Args:
        callback: with the settings ``inputs``, ``labels`` and ``logits``, and the threat.
        module: the user's.
        call: its step, of a batch.
        batch: the first.
        sandbox: for the extra call.

    Raises:
        ValueError: the task has no classes, or the input lies outside of the threat's range.
        StepSkipped: the step returned nothing.
    """
    name = type(callback).__name__
    path = find_input(batch, callback.inputs)
    callback.threat.check_input(get(batch, path), f"the batch's input {place_text(path)}")
    candidates = label_candidates(batch, path, callback.labels)
    layout = Layout(path, candidates[0] if candidates else None, candidates=candidates)
    named = None if callback.logits is None else submodule(module, callback.logits)
    with torch.enable_grad():
        found = find_logits(StepVictim(module, call, batch, layout, sandbox), module, named)
    if found is None or found.labels_path is None:
        raise ValueError(
            f"{name} needs logits and class labels, and none were found in the step: name the submodule that returns "
            'the logits with logits="…" and the labels with labels="…"'
        )
    return found


def bounded_logits(trainer: Any, victim: StepVictim, threat: Threat) -> Interval:
    """Bounds of the step's logits over all inputs that the threat allows.

    The step itself is run, on a box in its input's place, up to the logits: whatever it does before them is in.

    Args:
        trainer: whose precision is put aside, so that bounds are not rounded to half precision.
        victim: the step with its batch.
        threat: what the attacker may do.

    Raises:
        ValueError: an operation that cannot be bounded; says which.
        StepSkipped: the step returned before its logits.
    """
    x = get(victim.batch, victim.layout.input_path)

    def cut(logits: Any) -> None:
        raise _seams.LogitsReached(logits)

    try:
        with torch.autocast(x.device.type, enabled=False), _eagerly(victim.network()), victim.layout.watched(cut):
            victim.output(Interval.around(*enclosing_box(x, threat), x))  # type: ignore[arg-type]
    except _seams.LogitsReached as reached:
        if isinstance(reached.logits, Interval):
            return reached.logits
        raise ValueError(
            "interval bounds: what reaches the logits is no bound: does the step convert its input, or take another "
            'part of the batch? Name the input with inputs="…" and the source of the logits with logits="…"'
        ) from None
    raise StepSkipped


@contextmanager
def _eagerly(module: nn.Module) -> Iterator[None]:
    """Inside, what is compiled runs as it was written: the compiler knows no intervals."""
    with ExitStack() as stack:
        for part in module.modules():
            if part._compiled_call_impl is not None:
                stack.enter_context(_seams.patched(part, _compiled_call_impl=None))
            if type(part).__name__ == "OptimizedModule":  # what torch.compile(module) returns
                stack.enter_context(_seams.patched(part, forward=part._orig_mod))
        yield
