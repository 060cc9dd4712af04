"""The threat model: what an attacker may do to an input, in the units that the user thinks in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

NORMS = ("linf", "l2", "l1", "l0")


def parse_number(name: str, value: Any) -> float:
    """A float from a number or from text such as ``"8/255"``.

    Args:
        name: the setting's name, for the error message.
        value: int, float, or text that holds a decimal number or a fraction.

    Raises:
        ValueError: ``value`` is neither.
    """
    readable = isinstance(value, (int, float)) or (isinstance(value, str) and value.isascii())
    if isinstance(value, bool) or not readable:
        raise ValueError(f'{name} must be a number or a fraction such as "8/255", got {value!r}')
    try:
        return float(value)
    except (ValueError, OverflowError):
        pass
    try:
        return float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f'{name} must be a number or a fraction such as "8/255", got {value!r}') from None


def _parse_many(name: str, value: Any) -> float | tuple[float, ...]:
    value = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 0:
            raise ValueError(f"{name} must hold at least one number")
        return tuple(parse_number(name, v) for v in value)
    return parse_number(name, value)


def _parse_truths(name: str, value: Any) -> tuple[bool, ...]:
    value = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    if not isinstance(value, (list, tuple)) or not value or not all(v in (0, 1) for v in value):
        raise ValueError(f"{name} must hold one truth value a feature, got {value!r}")
    return tuple(map(bool, value))


def _norm_over_examples(d: Tensor, p: float) -> Tensor:
    """Norm of each example, shaped ``(B, 1, ...)`` so that it broadcasts against ``d``."""
    return torch.linalg.vector_norm(d.reshape(len(d), -1), ord=p, dim=1).view(-1, *[1] * (d.ndim - 1))


@dataclass(frozen=True)
class Threat:
    """How far an attacker may move an input, and where inputs live.

    Every quantity is in input units ("pixels"). Where the data pipeline normalises its inputs to ``(x - mean) / std``,
    give the same ``mean`` and ``std`` here: ``eps``, ``low`` and ``high`` stay in pixels and are mapped for you.
    Sequences run along dimension 1 of a batch: channels of ``(B, C, H, W)``, features of ``(B, D)``.

    Args:
        norm: ``"linf"``, ``"l2"``, ``"l1"`` or ``"l0"``.
        eps: radius of the ball, >= 0; a number or a fraction such as ``"8/255"``. For L0 a whole number: how many
            positions may change. A pixel of ``(B, C, H, W)`` counts as one with all its channels, a feature of
            ``(B, D)`` too.
        low: smallest legal input value; a number, or one a feature; ``-inf`` for none.
        high: largest legal input value, likewise.
        mean: what the data pipeline subtracted, or None; a number or one a channel.
        std: what the data pipeline divided by, or None; > 0.
        mutable: which features the attacker may change (None: all), one truth value a feature.

    Raises:
        ValueError: a setting is out of range; the message names it.

    Guarantees:
        ``enclose`` returns inputs whose perturbation has a norm of at most ``eps * (1 + 1e-6)``, that do not leave
        ``[low, high]`` by more than the clean input did, in float32, float64, float16 and bfloat16; with ``eps = 0``
        it returns ``x`` bit for bit; immutable features are returned bit for bit.
    """

    norm: str = "linf"
    eps: float | str = 8 / 255
    low: float | tuple[float, ...] = 0.0
    high: float | tuple[float, ...] = 1.0
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    mutable: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"threat.norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        parsed: dict[str, Any] = {"eps": parse_number("threat.eps", self.eps)}
        for name in ("low", "high", "mean", "std"):
            value = getattr(self, name)
            parsed[name] = None if value is None else _parse_many(f"threat.{name}", value)
        if self.mutable is not None:
            parsed["mutable"] = _parse_truths("threat.mutable", self.mutable)
        for name, value in parsed.items():
            object.__setattr__(self, name, value)
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise ValueError(f"threat.eps must be >= 0 and finite, got {self.eps}")
        if self.norm == "l0" and not self.radius.is_integer():
            raise ValueError(f"threat.eps must be a whole number of positions for norm l0, got {self.eps}")
        if parsed["low"] is None or parsed["high"] is None:
            raise ValueError("threat.low and threat.high must be numbers; for unbounded inputs give -inf and inf")
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        if low.ndim and high.ndim and low.shape != high.shape:
            raise ValueError(
                f"threat.low has {low.numel()} values and threat.high {high.numel()}: give as many of each"
            )
        if not bool((low < high).all()):
            raise ValueError(f"threat.low must be below threat.high, got {self.low} and {self.high}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("threat.mean and threat.std belong together: give both or neither")
        if self.mean is not None and not bool(torch.tensor(self.mean).isfinite().all()):
            raise ValueError(f"threat.mean must be finite, got {self.mean}")
        if self.std is not None and not bool(((std := torch.tensor(self.std)) > 0).logical_and(std.isfinite()).all()):
            raise ValueError(f"threat.std must be > 0 and finite, got {self.std}")

    @property
    def radius(self) -> float:
        """``eps`` as a float."""
        return float(self.eps)

    def scaled(self, factor: float) -> Threat:
        """The same threat with ``eps`` multiplied by ``factor``; for L0 rounded down to a whole number."""
        radius = self.radius * factor
        return replace(self, eps=math.floor(radius + 1e-9) if self.norm == "l0" else radius)

    def describe(self) -> str:
        """One line for logs: ``Linf ball of radius 0.2 in [0, 1]``."""
        norm = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0": "L0"}[self.norm]
        mapped = "" if self.mean is None else f", data normalised by mean {self.mean} and std {self.std}"
        masked = "" if self.mutable is None else f", {sum(self.mutable)} of {len(self.mutable)} features mutable"
        return f"{norm} ball of radius {self.radius:.6g} in [{self.low}, {self.high}]{mapped}{masked}"

    # --- geometry -------------------------------------------------------------------------------------------------

    def _vector(self, value: float | tuple[float, ...], x: Tensor) -> Tensor:
        """``value`` as a tensor that broadcasts against ``x``: sequences along dimension 1."""
        out = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if out.ndim == 0:
            return out
        if x.ndim < 2 or x.shape[1] != out.numel():
            raise ValueError(
                f"the threat has {out.numel()} values a feature, but dimension 1 of the input {tuple(x.shape)} does not"
            )
        return out.view(1, -1, *[1] * (x.ndim - 2))

    def scale(self, x: Tensor) -> Tensor:
        """Pixels per unit of the model's input, shaped to broadcast against ``x``: ``std``, or 1."""
        return self._vector(1.0 if self.std is None else self.std, x)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Model inputs ``(B, ...)`` back to pixels: ``x * std + mean``."""
        return x if self.mean is None else x * self.scale(x) + self._vector(self.mean, x)

    def from_pixels(self, x: Tensor) -> Tensor:
        """Pixels ``(B, ...)`` to model inputs: ``(x - mean) / std``."""
        return x if self.mean is None else (x - self._vector(self.mean, x)) / self.scale(x)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest legal model input around ``x``; the clean value itself is always legal."""
        mean, std = self._vector(0.0 if self.mean is None else self.mean, x), self.scale(x)
        low = torch.minimum((self._vector(self.low, x) - mean) / std, x)
        high = torch.maximum((self._vector(self.high, x) - mean) / std, x)
        if self.mutable is not None:
            movable = self._vector(tuple(float(m) for m in self.mutable), x) > 0
            low, high = torch.where(movable, low, x), torch.where(movable, high, x)
        return low, high

    def limits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The box, cut down to the ball where that is a box too (Linf): what ``project`` may be given to save work."""
        low, high = self.box(x)
        if self.norm == "linf":
            reach = self.radius / self.scale(x)
            low, high = torch.maximum(x - reach, low), torch.minimum(x + reach, high)
        return low, high

    def project(self, x_adv: Tensor, x: Tensor, limits: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Nearest legal inputs in working precision, as an attack's inner loop needs it.

        Args:
            x_adv: candidates ``(B, ...)``.
            x: clean inputs, same shape and dtype.
            limits: ``self.limits(x)`` where it is at hand.

        Returns:
            Tensor of the same shape, inside ball and box up to rounding. The L1 projection onto ball and box together
            is exact (bisection on its multiplier); so is that of L0, which keeps the positions that bring it nearest;
            for L2 the ball comes first, then the box, as is usual.

        Reference:
            Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1;
            Croce & Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks", 2021, section 3.
        """
        low, high = self.limits(x) if limits is None else limits
        if self.norm == "linf":
            return torch.clamp(x_adv, low, high)
        std = self.scale(x)
        if self.norm == "l0":
            inside = torch.clamp(x_adv, low, high)
            gain = ((x_adv - x) * std).square() - ((x_adv - inside) * std).square()
            return torch.where(_largest(gain, int(self.radius)), inside, x)
        delta = (x_adv - x) * std
        if self.norm == "l2":
            size = _norm_over_examples(delta, 2)
            delta = delta * (self.radius / size.clamp_min(torch.finfo(x.dtype).tiny)).clamp(max=1.0)
        else:
            room = torch.where(delta > 0, high - x, x - low) * std
            delta = _project_l1(delta, room, self.radius)
        return torch.clamp(x + delta / std, low, high)

    def enclose(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Final projection: computed in float64 and rounded towards ``x``, so that the promise holds in every dtype.

        Args:
            x_adv: adversarial inputs ``(B, ...)``; what is not a number counts as not perturbed.
            x: clean inputs, same shape.

        Returns:
            Tensor of ``x``'s shape and dtype (see the class's Guarantees).
        """
        found, clean = _wide(x_adv, x)
        return _rounded(self.project(found, clean), x, clean)

    def enclose_in_box(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The same for the box alone, whatever the ball: for attacks with limits of their own."""
        found, clean = _wide(x_adv, x)
        return _rounded(torch.clamp(found, *self.box(clean)), x, clean)

    def random_start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs drawn uniformly from the ball around ``x``, then moved into the box.

        For L0: positions drawn at random, with values drawn uniformly from the box, or within 1 of the clean ones where
        it has no end.

        Args:
            x: clean inputs ``(B, ...)``.
            generator: the only source of randomness; draws are made on its device.

        Returns:
            Tensor of ``x``'s shape.
        """
        kind = {"dtype": x.dtype, "device": generator.device}
        if self.norm == "l0":
            low, high = self.box(x)
            reach = 1 / self.scale(x)
            low, high = torch.where(low.isinf(), x - reach, low), torch.where(high.isinf(), x + reach, high)
            values = low + (high - low) * torch.rand(x.shape, generator=generator, **kind).to(x.device)
            order = torch.rand(positions(x).shape, generator=generator, device=generator.device).to(x.device)
            return torch.where(_largest(order, int(self.radius)), values, x)
        if self.norm == "linf":
            unit = torch.rand(x.shape, generator=generator, **kind) * 2 - 1
        elif self.norm == "l2":
            direction = torch.randn(x.shape, generator=generator, **kind)
            radius = torch.rand(x.shape[0], *[1] * (x.ndim - 1), generator=generator, **kind)
            radius = radius ** (1.0 / max(1, x[0].numel()))
            unit = direction / _norm_over_examples(direction, 2).clamp_min(torch.finfo(x.dtype).tiny) * radius
        else:  # exponential spacings: D coordinates and one for the distance from the surface
            size = torch.empty(x.shape, **kind).exponential_(generator=generator)
            rest = torch.empty(x.shape[0], *[1] * (x.ndim - 1), **kind).exponential_(generator=generator)
            sign = torch.randint(0, 2, x.shape, generator=generator, device=generator.device).to(x.dtype) * 2 - 1
            unit = sign * size / (_norm_over_examples(size, 1) + rest)
        return self.project(x + unit.to(x.device) * (self.radius / self.scale(x)), x)

    def ascend(self, grad: Tensor, step_size: float) -> Tensor:
        """A step of length ``step_size`` (pixels) that increases the loss, for a gradient in model space; not for L0.

        Args:
            grad: gradient of the loss to be increased ``(B, ...)``.
            step_size: length of the step in pixels: its largest entry for Linf, its Euclidean norm for L2 and L1.

        Returns:
            What to add to the model's input, ``(B, ...)``: steepest ascent for Linf and L2. For L1 a Euclidean step
            too: the exact projection that follows makes it sparse, and it goes on where the box blocks the largest
            entries.

        Reference:
            Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1.
        """
        std = self.scale(grad)
        if self.norm == "linf":
            return grad.sign() * (step_size / std)
        grad = grad / std  # in pixels
        if self.mutable is not None:
            grad = grad * self._vector(tuple(float(m) for m in self.mutable), grad)
        size = _norm_over_examples(grad, 2).clamp_min(torch.finfo(grad.dtype).tiny)
        return grad / size * step_size / std

    # --- measuring and checking -----------------------------------------------------------------------------------

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Norm of each example's perturbation in pixels, float64, shape ``(B,)``; for L0 the positions that differ."""
        if self.norm == "l0":
            return (positions((x_adv != x).double()) > 0).reshape(len(x), -1).sum(1).double()
        delta = (x_adv.double() - x.double()) * self.scale(x.double())
        order = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[self.norm]
        return torch.linalg.vector_norm(delta.reshape(len(x), -1), ord=order, dim=1)

    def check_input(self, x: Tensor, where: str = "the input") -> None:
        """Refuse data that this threat does not describe: silently wrong units would destroy training.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: values lie outside ``[low, high]`` by more than a thousandth of the range.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"{where} holds {x.dtype}, and only floating-point inputs can be perturbed. Convert it in the data "
                'pipeline (for example image.float() / 255), or name another input with inputs="…"; for token ids name '
                'the embedding with layer="…", whose output is perturbed instead.'
            )
        pixels = self.to_pixels(x.detach())
        low, high = self._vector(self.low, pixels), self._vector(self.high, pixels)
        slack = torch.where(torch.isfinite(high - low), 1e-3 * (high - low), torch.zeros_like(high - low))
        if bool(((pixels < low - slack) | (pixels > high + slack)).any()):
            found = f"[{pixels.min().item():.4g}, {pixels.max().item():.4g}]"
            if self.mean is not None:
                cure = "threat.mean and threat.std do not undo what the data pipeline did; give the pipeline's values"
            elif float(pixels.max()) > 2.0 and float(pixels.min()) >= 0:
                cure = "divide the data by 255 in the pipeline, or set threat.high=255 (and eps in the same units)"
            else:
                cure = (
                    "if the data pipeline normalises, give its numbers as threat.mean=… and threat.std=…; "
                    "if inputs really live elsewhere, set threat.low=… and threat.high=…; embeddings have no bounds: "
                    "threat.low=-.inf threat.high=.inf"
                )
            raise ValueError(
                f"{where} has values in {found}, outside threat.low={self.low} and threat.high={self.high}: {cure}."
            )


def _wide(x_adv: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, what is not a number in ``x_adv`` replaced by ``x``."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    found, clean = x_adv.detach().to(wide), x.to(wide)
    return torch.where(torch.isfinite(found), found, clean), clean


def _rounded(target: Tensor, x: Tensor, clean: Tensor) -> Tensor:
    """``target`` in the dtype of ``x``, rounded towards it; ``clean`` is ``x`` in the dtype of ``target``."""
    out = target.to(x.dtype)
    too_far = (out.to(clean.dtype) - clean).abs() > (target - clean).abs()
    return torch.where(too_far, torch.nextafter(out, x), out)


def positions(x: Tensor) -> Tensor:
    """Sums over the channels of each position: ``(B, C, ...)`` to ``(B, 1, ...)``, ``(B, D)`` as it is."""
    return x.sum(1, keepdim=True) if x.ndim > 2 else x


def _largest(worth: Tensor, count: int) -> Tensor:
    """A mask over the ``count`` positions of each example that are worth most, to broadcast against ``(B, C, ...)``."""
    each = positions(worth)
    flat = each.reshape(len(each), -1)
    best = flat.topk(min(count, flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, best, True).view_as(each)


def _project_l1(delta: Tensor, room: Tensor, eps: float, iterations: int = 40) -> Tensor:
    """Euclidean projection onto the L1 ball intersected with ``|delta| <= room``, by bisection on the multiplier."""
    size = delta.abs()
    limit = room.clamp_min(0.0)

    def shrunk(multiplier: Tensor) -> Tensor:
        return torch.minimum((size - multiplier).clamp_min(0.0), limit)

    def total(parts: Tensor) -> Tensor:
        return parts.reshape(len(parts), -1).sum(1).view(-1, *[1] * (delta.ndim - 1))

    below = torch.zeros_like(total(size))
    above = size.reshape(len(size), -1).amax(1).view_as(below)
    outside = total(shrunk(below)) > eps
    for _ in range(iterations):
        middle = (below + above) / 2
        too_big = total(shrunk(middle)) > eps
        below, above = torch.where(too_big, middle, below), torch.where(too_big, above, middle)
    return delta.sign() * shrunk(torch.where(outside, above, torch.zeros_like(above)))
