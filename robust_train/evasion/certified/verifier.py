"""What proves that no input of a ball changes the predicted class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.evasion.certified.interval import Affine, Interval, Map, ReLU, Sum
from robust_train.evasion.margins import class_scores
from robust_train.evasion.threat import Threat
from robust_train.evasion.threat_union import members_of


def enclosing_box(x: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """Ends of the smallest box around ball and box of a threat, each ``(B, ...)``.

    For Linf it is what the attacker may do; for L2 and L1 it is far more, so that little can be proved. For L0 it is
    the whole range of the inputs, and for several balls the box around all of them.
    """
    lows, highs = zip(*(_box_around(ball, x) for ball in members_of(threat)), strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def _box_around(ball: Threat, x: Tensor) -> tuple[Tensor, Tensor]:
    if ball.norm == "l0":
        return ball.box(x) if ball.radius > 0 else (x, x)
    return replace(ball, norm="linf").limits(x)


def class_differences(logits: Interval, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each example and class the row that gives the true class's score minus that class's.

    Args:
        logits: bounds of logits ``(B, classes)``, or of one score an example.
        labels: see ``class_scores``.

    Returns:
        Rows ``(B, classes, …)`` to be multiplied with the logits' entries, zeros for the true class; and the true
        classes ``(B,)``.

    Raises:
        ValueError: dense predictions or a regression.
    """
    scores, truth = class_scores(logits.point, labels)
    classes = scores.shape[1]
    if logits.point.numel() == len(logits.point):  # class 1 has the score, class 0 has 0
        sign = (2 * truth - 1).to(scores.dtype)
        rows = torch.stack([truth * sign, (1 - truth) * sign], 1)
        return rows.view(-1, 2, *[1] * (logits.point.ndim - 1)), truth
    own, each = F.one_hot(truth, classes).to(scores.dtype), torch.eye(classes, dtype=scores.dtype, device=scores.device)
    return own[:, None] - each, truth


def lower_bounds(rows: Tensor, out: Interval, through_relu: bool) -> Tensor:
    """Lower bounds of linear functions of what an interval stands for, by going back towards the input.

    Args:
        rows: the functions' coefficients ``(B, rows, *shape)``, where ``out`` has the shape ``(B, *shape)``.
        out: of any module.
        through_relu: go on through ReLU by two straight lines around it (CROWN); otherwise as far as affine layers go,
            where the intervals within take over.

    Returns:
        Tensor ``(B, rows)``.

    Reference:
        Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions", 2018,
        section 3; the lower line adapts as in its section 3.3.
    """
    total = rows.new_zeros(rows.shape[:2])
    waiting: dict[int, tuple[Interval, Tensor]] = {id(out): (out, rows)}

    def hand_on(inner: Interval, coefficients: Tensor) -> None:
        _, before = waiting.get(id(inner), (inner, 0))
        waiting[id(inner)] = inner, before + coefficients

    while waiting:
        here, coefficients = waiting.pop(max(waiting, key=lambda key: waiting[key][0].depth))
        step = here.step
        if isinstance(step, Sum):
            hand_on(step.first, coefficients)
            hand_on(step.second, coefficients)
        elif isinstance(step, Affine):
            back, constant = _through(step.apply, coefficients, step.inner.point.shape[1:])
            hand_on(step.inner, back)
            total = total + constant
        elif isinstance(step, ReLU) and through_relu:
            back, constant = _around_relu(step.inner, coefficients)
            hand_on(step.inner, back)
            total = total + constant
        else:
            ends = coefficients.clamp_min(0) * here.low[:, None] + coefficients.clamp_max(0) * here.high[:, None]
            total = total + ends.flatten(2).sum(2)
    return total


def _through(apply: Map, coefficients: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Coefficients before an affine step, and what the step adds."""
    examples, rows = coefficients.shape[:2]
    with torch.enable_grad():
        zero = coefficients.new_zeros(examples * rows, *shape).requires_grad_()
        out = apply(zero)
        (back,) = torch.autograd.grad(out, zero, coefficients.flatten(0, 1), create_graph=True)
    constant = (coefficients.flatten(2) * out.reshape(examples, rows, -1)).sum(2)
    return back.reshape(examples, rows, *shape), constant


def _around_relu(inner: Interval, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The same for ReLU: positive coefficients take a line below it, negative ones a line above it."""
    low, high = inner.low, inner.high
    crossing = (low < 0) & (high > 0)
    above = torch.where(crossing, high / torch.where(crossing, high - low, 1.0), (low >= 0).to(low.dtype))[:, None]
    below = torch.where(crossing, high > -low, low >= 0).to(low.dtype)[:, None]
    offset = torch.where(crossing, -low, 0.0)[:, None] * above
    rising, falling = coefficients.clamp_min(0), coefficients.clamp_max(0)
    return rising * below + falling * above, (falling * offset).flatten(2).sum(2)


class Verifier(ABC):
    """Lower bounds of how far the true class's score lies above every other one's."""

    @abstractmethod
    def margins(self, logits: Interval, labels: Tensor) -> Tensor:
        """The best bounds that the method knows.

        Args:
            logits: what a module made of the box of inputs, ``(B, classes)``.
            labels: class indices ``(B,)``, or what ``class_scores`` takes.

        Returns:
            Lower bounds of ``score of the true class - score of each class``, ``(B, classes)``; 0 for the true class.
        """

    def training_margins(self, logits: Interval, labels: Tensor, progress: float) -> Tensor:
        """Those that training uses; they carry gradients to the parameters.

        Args:
            logits: see ``margins``.
            labels: see ``margins``.
            progress: of the schedule, 0 to 1.
        """
        return self.margins(logits, labels)


def worst_case_loss(margins: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of the worst logits that the bounds allow, ``(B,)``.

    Args:
        margins: of a ``Verifier``, ``(B, classes)``.
        truth: true classes ``(B,)``.

    Reference:
        Gowal et al., 2018, section 3, equation 12.
    """
    return F.cross_entropy(-margins, truth, reduction="none")


def are_positive(margins: Tensor, truth: Tensor) -> Tensor:
    """Whether the true class's score lies above all others', bool ``(B,)``."""
    own = F.one_hot(truth, margins.shape[1]).bool()
    return (margins.masked_fill(own, torch.inf) > 0).all(1)


def interval_bounds(module: nn.Module, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of what a module returns for any input of a box.

    The module's own forward pass is run, once, on a box instead of a tensor, in the mode in which the module is.

    Args:
        module: takes ``(B, ...)``, treats each example by itself and is made of layers that have a rule (see
            ``Interval``); whatever else is refused by its name.
        low: lower ends of the inputs ``(B, ...)``.
        high: upper ends, same shape.

    Returns:
        Lower and upper ends of the outputs.

    Raises:
        ValueError: an operation without a rule, or ends in the wrong order; the message says what to change.
    """
    out = module(Interval.around(low, high))
    if not isinstance(out, Interval):
        raise ValueError(f"interval bounds: {type(module).__name__} returns no single tensor, got {type(out).__name__}")
    return out.low, out.high


def verified(module: nn.Module, x: Tensor, y: Tensor, threat: Threat, verifier: Verifier) -> Tensor:
    """Whether no input that the threat allows is misclassified, as far as it can be proved.

    Args:
        module: returns logits ``(B, classes)``; judged in the mode in which it is: call ``module.eval()`` before.
        x: clean inputs ``(B, ...)``.
        y: class indices ``(B,)``.
        threat: Linf; for L2 and L1 the box around the ball, which is much larger, is looked at.
        verifier: how.

    Returns:
        Bool ``(B,)``. False means that nothing was proved, not that there is an adversarial example.

    Raises:
        ValueError: an operation that cannot be bounded.

    Guarantees:
        An example that is verified is classified right when clean and under every attack within the threat, up to
        rounding. With ``eps = 0`` the verified examples are those that are right.
    """
    with torch.no_grad():
        logits = module(Interval.around(*enclosing_box(x, threat), x))
        if not isinstance(logits, Interval):
            raise ValueError(f"interval bounds: {type(module).__name__} returns no single tensor")
        return proved(logits, y, verifier, module(x))


def proved(logits: Interval, labels: Tensor, verifier: Verifier, clean: Tensor) -> Tensor:
    """Which examples are verified, bool ``(B,)``.

    Args:
        logits: bounds of the logits.
        labels: see ``class_scores``.
        verifier: how.
        clean: the logits of the clean inputs.

    Raises:
        ValueError: the bounds were led along another way than the clean inputs, and say nothing of the model.
    """
    near = 0.05 if logits.point.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not torch.allclose(clean.float(), logits.point.float(), rtol=near, atol=near * float(clean.abs().max() + 1)):
        raise ValueError(
            "interval bounds: the module computes something else for a box than for a tensor, so the bounds would say "
            "nothing: does it look at its input's type, draw at random, or write into what it has viewed differently?"
        )
    scores, truth = class_scores(clean, labels)
    return are_positive(verifier.margins(logits, labels), truth) & (scores.argmax(1) == truth)
