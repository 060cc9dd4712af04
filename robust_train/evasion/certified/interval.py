"""A box of tensors that runs through an unmodified module in a tensor's place, and becomes a box around its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Affine:
    """The interval is ``apply(inner)``; ``apply`` is affine, treats each example by itself and takes any number."""

    inner: Interval
    apply: Map


@dataclass(frozen=True)
class Sum:
    """The interval is the sum of two others, of the same shape."""

    first: Interval
    second: Interval


@dataclass(frozen=True)
class ReLU:
    """The interval is ``max(inner, 0)``."""

    inner: Interval


class Interval(Tensor):
    """All tensors between ``low`` and ``high``, entry by entry.

    Handed to a module instead of a tensor, it is what every operation of the module's own forward pass sees, and comes
    out as bounds of the output for all inputs between its ends. What has no rule here is refused by its name, so that
    nothing is ever bounded by guess; so is whatever looks at values, such as a branch.

    Attributes:
        low: lower ends ``(B, ...)``.
        high: upper ends, same shape.
        point: one tensor within, same shape: the clean input, and what becomes of it.
        step: how it came about, for tighter bounds; None for an input and after steps that are not affine.
        depth: how many steps lie before it.

    Guarantees:
        In real arithmetic, each output for an input between the ends lies between the output's ends; computed in the
        module's own precision, up to its rounding.

    Reference:
        Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018,
        section 3.
    """

    low: Tensor
    high: Tensor
    point: Tensor
    step: Affine | Sum | ReLU | None
    depth: int

    @staticmethod
    def around(
        low: Tensor, high: Tensor, point: Tensor | None = None, step: Affine | Sum | ReLU | None = None
    ) -> Interval:
        """The interval with these ends; ``point`` None: the middle.

        Raises:
            ValueError: the shapes differ, or a lower end lies above the upper one.
        """
        if low.shape != high.shape:
            raise ValueError(f"low and high must have one shape, got {tuple(low.shape)} and {tuple(high.shape)}")
        if not low.is_floating_point():
            raise ValueError(f"interval bounds: intervals hold floating-point numbers, got {low.dtype}")
        if step is None and bool((low > high).any()):
            raise ValueError("low must not lie above high")
        self = low.detach().as_subclass(Interval)
        self.low, self.high, self.point, self.step = low, high, (low + high) / 2 if point is None else point, step
        before = (step.first, step.second) if isinstance(step, Sum) else () if step is None else (step.inner,)
        self.depth = 1 + max((one.depth for one in before), default=0)
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Interval{tuple(self.low.shape)}"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(args[0].low, *args[1:], **kwargs)
        rule = _RULES.get(func)
        count = sum(isinstance(value, Interval) for value in _flat((*args, *kwargs.values())))
        if rule is None or count > (2 if rule in (_sum, _difference) else 1):
            raise ValueError(refusal(func))
        if not isinstance(args[0], Interval) and (rule not in (_sum, _difference, _product) or func in _IN_PLACE):
            raise ValueError(refusal(func))
        return rule(func, *args, **kwargs)

    def become(self, other: Interval) -> Interval:
        """What an in-place operation does: this interval is the other from now on."""
        self.low, self.high, self.point = other.low, other.high, other.point
        self.step, self.depth = other.step, other.depth
        return self

    def kept(self) -> Interval:
        """The interval as it is now, whatever becomes of this one."""
        other = self.low.detach().as_subclass(Interval)
        return other.become(self)


def refusal(func: Any) -> str:
    """What to say of an operation without a rule."""
    name = str(resolve_name(func) or getattr(func, "__name__", func))
    otherwise = f"name the part of the model that can be bounded, or use {', '.join(_KNOWN)}"
    cure = next((cure for part, cure in _CURES.items() if part in name), otherwise)
    return f"interval bounds: there is no rule for {name}: {cure}"


_KNOWN = ("Linear", "Conv", "BatchNorm", "ReLU", "LeakyReLU", "Tanh", "Sigmoid", "average and max pooling", "Flatten")
_CURES = {
    "group_norm": "it divides by the spread of its input; use BatchNorm, or no normalisation",
    "layer_norm": "it divides by the spread of its input; use BatchNorm, or no normalisation",
    "gelu": "it is not monotone; use ReLU",
    "silu": "it is not monotone; use ReLU",
    "mish": "it is not monotone; use ReLU",
    "softmax": "return logits instead of probabilities",
    "scaled_dot_product_attention": "products of two intervals are not bounded; use convolutions or linear layers",
    "matmul": "use Linear",
    "Tensor.item": "a branch or a number that depends on the input's values cannot be bounded",
    "__bool__": "a branch or a number that depends on the input's values cannot be bounded",
    "cross_entropy": "the logits are bounded, not the loss; the step must compute logits of one submodule",
}


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for v in values for one in (_flat(v) if isinstance(v, (list, tuple)) else [v])]


# --- rules ------------------------------------------------------------------------------------------------------------


def _weighted(
    func: Any, x: Interval, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Interval:
    """Linear layers and convolutions: the middle as ever, the half width by the absolute weights."""

    def apply(t: Tensor) -> Tensor:
        return func(t, weight, bias, *args, **kwargs)

    middle = apply((x.low + x.high) / 2)
    width = func((x.high - x.low) / 2, weight.abs(), None, *args, **kwargs)
    return Interval.around(middle - width, middle + width, apply(x.point), Affine(x, apply))


def _each(x: Interval, apply: Map) -> Interval:
    """An affine function of each entry by itself, rising or falling."""
    one, other = apply(x.low), apply(x.high)
    return Interval.around(torch.minimum(one, other), torch.maximum(one, other), apply(x.point), Affine(x, apply))


def _rising(x: Interval, apply: Map) -> Interval:
    """A linear function without negative weights: means, views, casts."""
    return Interval.around(apply(x.low), apply(x.high), apply(x.point), Affine(x, apply))


def _batch_norm(
    func: Any,
    x: Interval,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """In training mode with the statistics of the clean inputs, as constants that carry gradients."""
    if not training:
        return _each(x, lambda t: func(t, running_mean, running_var, weight, bias, False, 0.0, eps))
    dims, shape = [0, *range(2, x.point.ndim)], (1, -1, *[1] * (x.point.ndim - 2))
    var, mean = torch.var_mean(x.point, dims, correction=0)
    slope = (var + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * slope
    return _each(x, lambda t: t * slope.view(shape) + shift.view(shape))


def _dropout(func: Any, x: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    """One mask for all: multiplied by what is not negative."""
    if not training or p == 0:
        return x
    mask = func(torch.ones_like(x.point), p, True)
    out = _rising(x.kept(), lambda t: t * _matched(mask, t))
    return x.become(out) if inplace else out


def _monotone(func: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Activations that never fall, and max pooling: the ends of the interval give the ends."""
    inplace = bool(kwargs.pop("inplace", False)) or func in _IN_PLACE
    if func in _SLOPED and any(v < 0 for v in (*args, *kwargs.values())):
        raise ValueError(f"interval bounds: {resolve_name(func)} with a negative slope is not monotone; use one >= 0")
    if kwargs.get("return_indices"):
        raise ValueError(f"interval bounds: {resolve_name(func)} must not return indices, which cannot be bounded")
    inner = x.kept() if inplace else x
    plain = _OUT_OF_PLACE.get(func, func)

    def apply(t: Tensor) -> Tensor:
        return plain(t, *args, **kwargs)

    step = ReLU(inner) if func in _RELU else None
    ends = apply(x.low), apply(x.high), apply(x.point)
    out = Interval.around(*ends, step) if step else _unrelated(*ends, inner.depth)
    return x.become(out) if inplace else out


def _unrelated(low: Tensor, high: Tensor, point: Tensor, depth: int) -> Interval:
    out = Interval.around(low, high, point)
    out.depth = depth + 1
    return out


def _constant(c: Any, func: Any) -> Any:
    if isinstance(c, Tensor) or (isinstance(c, (int, float)) and not isinstance(c, bool)):
        return c
    raise ValueError(refusal(func))


def _matched(c: Any, t: Tensor) -> Any:
    """A constant for each example, repeated where there are several rows an example."""
    if isinstance(c, Tensor) and c.ndim == t.ndim and c.shape[0] not in (1, len(t)):
        return c.repeat_interleave(len(t) // c.shape[0], 0)
    return c


def _sum(func: Any, a: Any, b: Any) -> Interval:
    if isinstance(a, Interval) and isinstance(b, Interval):
        if a.low.shape != b.low.shape:
            raise ValueError(refusal(func))
        inner = a.kept() if func in _IN_PLACE else a
        out = Interval.around(a.low + b.low, a.high + b.high, a.point + b.point, Sum(inner, b))
        return a.become(out) if func in _IN_PLACE else out
    x, c = (a, b) if isinstance(a, Interval) else (b, a)
    return _shifted(func, x, lambda t: t + _matched(_constant(c, func), t))


def _difference(func: Any, a: Any, b: Any) -> Interval:
    if isinstance(a, Interval) and isinstance(b, Interval):
        return _sum(torch.add, a, _each(b, lambda t: -t))
    if isinstance(a, Interval):
        return _shifted(func, a, lambda t: t - _matched(_constant(b, func), t))
    return _shifted(func, b, lambda t: _matched(_constant(a, func), t) - t)


def _reversed_difference(func: Any, x: Interval, c: Any) -> Interval:
    return _shifted(func, x, lambda t: _matched(_constant(c, func), t) - t)


def _product(func: Any, a: Any, b: Any) -> Interval:
    x, c = (a, b) if isinstance(a, Interval) else (b, a)
    return _shifted(func, x, lambda t: t * _matched(_constant(c, func), t))


def _quotient(func: Any, x: Interval, c: Any) -> Interval:
    return _shifted(func, x, lambda t: t / _matched(_constant(c, func), t))


def _negative(func: Any, x: Interval) -> Interval:
    return _each(x, lambda t: -t)


def _shifted(func: Any, x: Interval, apply: Map) -> Interval:
    if func in _IN_PLACE:
        return x.become(_each(x.kept(), apply))
    out = _each(x, apply)
    if out.low.shape[0] != x.low.shape[0] or out.low.ndim != x.low.ndim:
        raise ValueError(refusal(func))
    return out


def _viewed(func: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """A new shape for each example's entries, in their order."""
    seen = func(x.point, *args, **kwargs)
    shape = seen.shape
    if len(shape) == 0 or shape[0] != x.point.shape[0] or seen.dtype != x.point.dtype:
        raise ValueError(f"{refusal(func)} (this one mixes examples)")
    return _rising(x, lambda t: t.reshape(t.shape[0], *shape[1:]))


def _turned(func: Any, x: Interval, *dims: Any, **kwargs: Any) -> Interval:
    """Dimensions in another order, that of the examples the first."""
    shape = x.point.shape
    named = torch.empty_strided(shape, tuple(range(len(shape))), device="meta")  # each dimension's stride is its number
    if func(named, *dims, **kwargs).stride()[0] != 0:
        raise ValueError(f"{refusal(func)} (this one mixes examples)")
    return _rising(x, lambda t: func(t, *dims, **kwargs))


def _reduced(func: Any, x: Interval, dim: Any = None, keepdim: bool = False) -> Interval:
    """Sums and means over an example's own dimensions."""
    dims = [] if dim is None else [d % x.point.ndim for d in (dim if isinstance(dim, (list, tuple)) else (dim,))]
    if not dims or 0 in dims:
        raise ValueError(f"{refusal(func)} (this one mixes examples)")
    return _rising(x, lambda t: func(t, dims, keepdim))


def _pooled(func: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    return _rising(x, lambda t: func(t, *args, **kwargs))


T: Any = Tensor
_ABOUT = {
    T.shape.__get__, T.ndim.__get__, T.dtype.__get__, T.device.__get__, T.layout.__get__, T.is_cuda.__get__,
    T.is_sparse.__get__, T.requires_grad.__get__, T.size, T.dim, T.numel, T.nelement, T.__len__, T.is_floating_point,
    T.get_device, T.is_complex, T.is_contiguous, torch.is_floating_point, torch.numel, T.is_quantized.__get__,
}  # fmt: skip
_RELU = {F.relu, torch.relu, T.relu, torch.relu_, T.relu_}
_SLOPED = {F.leaky_relu, F.elu, F.celu, F.softplus}
_OUT_OF_PLACE: dict[Any, Any] = {torch.relu_: torch.relu, T.relu_: torch.relu}
_IN_PLACE = {torch.relu_, T.relu_, T.add_, T.__iadd__, T.sub_, T.__isub__, T.mul_, T.__imul__, T.div_, T.__itruediv__}
_RULES: dict[Any, Callable[..., Interval]] = {
    **dict.fromkeys((F.linear, torch.conv1d, torch.conv2d, torch.conv3d), _weighted),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d), _weighted),
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout),
    **dict.fromkeys((*_RELU, F.leaky_relu, F.elu, F.celu, F.selu, F.softplus, F.relu6, F.hardtanh), _monotone),
    **dict.fromkeys((torch.tanh, T.tanh, torch.sigmoid, T.sigmoid, F.logsigmoid, F.hardsigmoid), _monotone),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.clamp, T.clamp), _monotone),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d), _monotone),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _pooled),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _pooled),
    **dict.fromkeys((F.pad, T.float, T.double, T.to, T.type_as, T.clone, T.contiguous, T.detach), _pooled),
    **dict.fromkeys((torch.flatten, T.flatten, T.reshape, torch.reshape, T.view), _viewed),
    **dict.fromkeys((torch.squeeze, T.squeeze, torch.unsqueeze, T.unsqueeze), _viewed),
    **dict.fromkeys((torch.permute, T.permute, torch.transpose, T.transpose), _turned),
    **dict.fromkeys((torch.mean, T.mean, torch.sum, T.sum), _reduced),
    **dict.fromkeys((torch.add, T.add, T.__add__, T.__radd__, T.__iadd__, T.add_), _sum),
    **dict.fromkeys((torch.sub, T.sub, T.__sub__, T.__isub__, T.sub_), _difference),
    T.__rsub__: _reversed_difference,
    **dict.fromkeys((torch.mul, T.mul, T.__mul__, T.__rmul__, T.__imul__, T.mul_), _product),
    **dict.fromkeys((torch.div, T.div, T.__truediv__, T.__itruediv__, T.div_), _quotient),
    **dict.fromkeys((torch.neg, T.neg, T.__neg__), _negative),
}  # fmt: skip
