"""Backward pass differentiable approximation: steps without a useful gradient are passed straight through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust_train.evasion.attacks.base import Attack
from robust_train.evasion.threat import NORMS, Threat
from robust_train.evasion.victim import Victim


def straight_through(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``step(x)``, with the gradient of the identity.

    For a step that is a function and no submodule: ``ClassifierVictim(lambda x: net(straight_through(jpeg, x)), y)``.

    Args:
        step: keeps the shape; what it does to gradients does not matter, it is called outside the graph.
        x: floating point, any shape.

    Raises:
        ValueError: ``step`` changes the shape.
    """
    with torch.no_grad():
        out = step(x.detach().clone())
    return _Identity.apply(x, _checked(out, x, step))  # type: ignore[no-any-return]


@contextmanager
def passed_through(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each module's output is as ever and its backward pass that of the identity.

    Args:
        modules: each takes a tensor first and returns one of the same shape.

    Raises:
        ValueError: in the forward pass: a module that does not.
    """
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(f"bpda: {type(module).__name__} is not called with a tensor first, and cannot be passed")
        entered.append(args[0])
        return (args[0].detach().clone(), *args[1:])  # detached, because it may go on in numpy

    def leave(module: nn.Module, _: tuple[Any, ...], out: Any) -> Tensor:
        x = entered.pop()
        return _Identity.apply(x, _checked(out, x, module))  # type: ignore[no-any-return]

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, prepend=True).remove)
        yield


def without_gradient(victim: Victim, x: Tensor) -> list[nn.Module]:
    """The model's layers that keep the shape of their input and give it no gradient, or one that is zero throughout.

    Args:
        victim: the model under attack.
        x: inputs to try it on ``(B, ...)``.

    Returns:
        Layers without children, in the order of their calls. A layer that is behind another one without a gradient is
        found too.
    """
    layers = [m for m in victim.network().modules() if next(m.children(), None) is None]
    found: list[nn.Module] = []

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        x = args[0] if args else None
        if module in found or not (isinstance(x, Tensor) and isinstance(out, Tensor)):
            return
        if not x.requires_grad or out.shape != x.shape or not out.is_floating_point():
            return
        grad = None
        if out.requires_grad:  # weights that differ: normalisation layers have no gradient in the sum of their outputs
            weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
            (grad,) = torch.autograd.grad(out, x, weights, retain_graph=True, allow_unused=True)
        if grad is None or not bool(grad.any()):
            found.append(module)

    known = -1
    while len(found) > known:
        known = len(found)
        with ExitStack() as stack, torch.enable_grad():
            for layer in layers:
                if layer not in found:
                    stack.callback(layer.register_forward_hook(leave).remove)
            stack.enter_context(passed_through(tuple(found)))
            victim.loss(x.detach().requires_grad_(True))
    return found


def bpda(
    victim: Victim,
    x: Tensor,
    threat: Threat,
    *,
    attack: Attack,
    modules: Sequence[nn.Module],
    generator: torch.Generator,
) -> Tensor:
    """Run an attack while some of the model's modules have the identity's gradient.

    Args:
        victim: the model under attack.
        x: clean inputs ``(B, ...)``.
        threat: ball and box.
        attack: the attack within.
        modules: submodules of the model, see ``passed_through``.
        generator: source of all randomness.

    Returns:
        What the attack within found, ``(B, ...)``.
    """
    with passed_through(modules):
        return attack(victim, x, threat, generator)


@dataclass(frozen=True)
class BPDA(Attack):
    """Any attack, past steps that hide the gradient: rounding, thresholds, median filters, compression.

    Args:
        attack: the attack within.
        modules: which of the model's submodules get the identity's gradient: names as in ``named_modules()``, or a
            function that says of a module whether it is one. None: every layer that keeps its input's shape and has no
            gradient on this batch (one forward pass more). Layers that go on in numpy must be named, because looking
            for a gradient breaks them.

    Raises:
        TypeError: ``attack`` is not an attack, or ``modules`` neither names nor a function.
        ValueError: an empty list; when it is called: no such submodule, or the victim is no torch module.

    Reference:
        Athalye et al., "Obfuscated Gradients Give a False Sense of Security", 2018, section 4.1.
    """

    family: ClassVar[str] = "ensemble"

    attack: Attack
    modules: Sequence[str] | Callable[[nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(f"bpda.attack must be an attack, got {self.attack!r}")
        if self.modules is None or callable(self.modules):
            return
        if isinstance(self.modules, str) or not isinstance(self.modules, Sequence):
            raise TypeError(f"bpda.modules must be a list of names, a function or null, got {self.modules!r}")
        object.__setattr__(self, "modules", tuple(self.modules))
        if not self.modules or not all(isinstance(name, str) and name for name in self.modules):
            raise ValueError(f"bpda.modules must hold names of submodules, got {self.modules!r}")

    works_in: ClassVar[tuple[str, ...]] = NORMS  # the attack within says which

    @property
    def limits(self) -> str | None:
        return self.attack.limits

    @property
    def needs(self) -> frozenset[str]:
        return self.attack.needs

    @property
    def reach(self) -> float:
        return self.attack.reach

    @property
    def passes(self) -> float:
        return self.attack.passes + (0.5 if self.modules is None else 0.0)

    @property
    def starts_at_clean_input(self) -> bool:
        return self.attack.starts_at_clean_input

    def check(self, threat: Threat) -> None:
        self.attack.check(threat)

    def perturb(self, victim: Victim, x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
        modules = without_gradient(victim, x) if self.modules is None else self._named(victim.network())
        return bpda(victim, x, threat, attack=self.attack, modules=modules, generator=generator)

    def _named(self, network: nn.Module) -> list[nn.Module]:
        if self.modules is None or callable(self.modules):
            found = [m for m in network.modules() if self.modules is not None and self.modules(m)]
            if not found:
                raise ValueError(f"bpda.modules: the function accepts no module of {type(network).__name__}")
            return found
        known = dict(network.named_modules())
        for name in self.modules:
            if name not in known:
                raise ValueError(
                    f"bpda.modules: {type(network).__name__} has no submodule {name!r}; "
                    f"it has: {', '.join(key for key in known if key) or 'none'}"
                )
        return [known[name] for name in self.modules]


class _Identity(torch.autograd.Function):
    """Its second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _checked(out: Any, x: Tensor, step: Any) -> Tensor:
    """What a step returned, outside the graph."""
    if not isinstance(out, Tensor) or out.shape != x.shape:
        name = type(step).__name__ if isinstance(step, nn.Module) else getattr(step, "__name__", repr(step))
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"bpda: {name} must return a tensor of its input's shape {tuple(x.shape)}, got {got}")
    return out.detach().to(x.dtype)
