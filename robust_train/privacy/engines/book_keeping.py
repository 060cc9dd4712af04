"""One backward pass: book-keeping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_train.privacy.clipping.base import Clipping
from robust_train.privacy.engines.base import ClippedSum, Engine, RowsMismatch, UnsupportedLayer
from robust_train.privacy.engines.combine import combine, full_precision
from robust_train.privacy.engines.layers import owners, rule
from robust_train.privacy.engines.layers.base import Rule
from robust_train.privacy.engines.tape import Tape
from robust_train.privacy.engines.terms import Term, total, wide


class BookKeeping(Engine):
    """One backward pass records each layer's inputs and output gradients; norms and sums are told from these.

    Autograd computes no gradient of the parameters: after the backward pass their ``grad`` is zeros. Where several
    layers share a parameter, or one is called several times, their gradients count as one, exactly. Layers that
    have no rule are run again for each example, under ``torch.func.vmap``.

    Args:
        module: whose per-example gradients are wanted.
        parameters: of the module, each requiring a gradient.

    Attributes:
        layers: how each layer's gradients are told, by its name: ``"ghost"`` where they are not written out,
            ``"instantiate"`` where they are, ``"opacus"`` or ``"vmap"`` where a layer has no rule; until the first
            ``clipped_sum`` that it has a part in, ``"not seen"``.

    Guarantees:
        Outputs of layers that have a rule are those of the module without the engine, bit for bit.
        A gradient that reached a parameter by another way than through its recorded layers is refused.

    Reference:
        Bu et al., "Differentially Private Optimization on Large Model at Small Cost", 2023, section 3.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(module, parameters)
        self._tape = Tape()
        self._untouched: list[nn.Parameter] = []
        self._index = {p: i for i, p in enumerate(self.parameters)}
        self._rules = {rule(*owner): owner[0] for owner in owners(module, set(self.parameters))}
        self.layers = dict.fromkeys(self._rules.values(), "not seen")
        for each, name in self._rules.items():
            if "forward" in each.layer.__dict__:
                raise UnsupportedLayer(f"{name or 'the module'} has a forward of its own: is another engine attached?")
        for each in self._rules:
            each.layer.__dict__["forward"] = Recorded(each, self._tape)
        torch.compiler.reset()  # what was compiled before calls the layers' own forward, and does not look for others

    def start(self) -> None:
        self._tape.reset(forward=True)

    def stop(self) -> None:
        self._tape.reset(forward=False)

    def arm(self) -> None:
        self._tape.backward = True
        touched = set(self._touched(self.parameters))
        self._untouched = [p for p in self.parameters if p not in touched]

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._tape.paused():
            yield

    def close(self) -> None:
        self.stop()
        for each in self._rules:
            each.layer.__dict__.pop("forward", None)
        self._rules = {}
        torch.compiler.reset()

    @torch.no_grad()
    def clipped_sum(
        self,
        examples: int,
        bound: float,
        clipping: Clipping,
        *,
        views: int = 1,
        scale: float = 1.0,
        weights: Tensor | None = None,
    ) -> ClippedSum:
        with full_precision(self.parameters[0].device):
            terms = self._terms(examples, views)
            return combine(terms, self.parameters, examples, examples * scale, bound, clipping, weights)

    def _terms(self, examples: int, views: int) -> dict[int, Term]:
        """What was recorded, in one term for each parameter that it reached."""
        records = self._tape.take()
        self._refuse_bypass()
        if not records:
            raise RowsMismatch("no backward pass was recorded: call start() before the forward pass, arm() after it")
        found: dict[int, list[Term]] = defaultdict(list)
        reached: set[Rule] = set()
        while records:
            record = records.pop()
            record = replace(record, inputs=tuple(map(wide, record.inputs)), gradient=wide(record.gradient))
            source: Rule = record.source
            if (rows := source.rows(record)) != examples * views:
                shapes = " and ".join(str(tuple(x.shape)) for x in record.inputs)
                raise RowsMismatch(
                    f"{self._rules[source] or 'the module'}, {type(source.layer).__name__}, was called with {shapes}, "
                    f"{rows} rows in a batch of {examples * views}: the first dimension of every layer's input is to "
                    "run over the rows of the batch"
                )
            for addition in source.additions(record, examples):
                found[self._index[source.trained[addition.parameter]]].append(addition.term)
            reached.add(source)
        terms = {i: total(found.pop(i)) for i in list(found)}
        for source in reached:
            first = next(i for i in map(self._index.__getitem__, source.trained.values()) if i in terms)
            self.layers[self._rules[source]] = source.method or terms[first].method
        return terms

    @staticmethod
    def _touched(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those whose ``grad`` is not zero."""
        some = [(p, p.grad.any()) for p in parameters if p.grad is not None]
        flags = torch.stack([flag for _, flag in some]).tolist() if some else []  # one wait for the device, not many
        return [p for (p, _), flag in zip(some, flags, strict=True) if flag]

    def _refuse_bypass(self) -> None:
        touched, self._untouched = self._touched(self._untouched), []
        if touched:
            names = ", ".join(self._names[p] for p in touched)
            raise RowsMismatch(
                f"a gradient that cannot be split by example reached {names}: by use of a parameter outside of its "
                "layer's forward, by a penalty on it within the loss, or by a forward pass within paused()"
            )


class Recorded:
    """Stands in for a layer's ``forward``."""

    def __init__(self, rule: Rule, tape: Tape) -> None:
        self.rule, self.tape = rule, tape

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.tape.forward and torch.is_grad_enabled():
            return self.rule.forward(self.tape, *args, **kwargs)
        return type(self.rule.layer).forward(self.rule.layer, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of a layer, by copy or pickle, have its own forward: nothing of the engine goes along.
        return getattr, (self.rule.layer, "forward")
