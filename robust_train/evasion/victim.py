"""The model under attack, as an attack may see it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_train.evasion.gradients import LOWER, START, Harvest, LossScale, any_in_row, is_half, unscaled
from robust_train.evasion.randomness import seed_global_rng


class Victim(ABC):
    """What an attack may ask of a model for one batch.

    Attributes:
        labels: labels of the batch, or None where the task has none.
        stop_when_fooled: the attack is for a verdict only, so examples that are fooled may leave it at once.
        gradient_scale: factor on the loss to begin with while it is differentiated, a power of two, against gradients
            that underflow in fp16; see ``input_gradient``.
        found_scale: the factor that has turned out to work, once one has been tried.
        gradients: where a list stands, each gradient adds whether it has an entry that is not zero.
        harvest: where one stands, each gradient in the input adds those in the parameters.
        provides: which of ``"loss"``, ``"per_example_loss"``, ``"logits"`` and ``"labels"`` can be had.
    """

    labels: Tensor | None = None
    stop_when_fooled: bool = False
    gradient_scale: float = 1.0
    found_scale: LossScale | None = None
    gradients: list[Tensor] | None = None
    harvest: Harvest | None = None
    provides: frozenset[str] = frozenset({"loss"})

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """The loss that an attacker increases: ``(B,)`` one an example, or a scalar where only the mean is known."""

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalised class scores ``(B, classes, ...)``.

        Raises:
            ValueError: the task has none.
        """
        raise ValueError("this attack needs logits, and the model under attack has none")

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both from one forward pass where the victim can."""
        return self.loss(x), self.logits(x)

    def score(self, x: Tensor) -> Tensor:
        """Share of each example's outputs that is right, ``(B,)``: 0 or 1, a fraction for dense predictions."""
        with torch.no_grad():
            return correctness(self.logits(x), self.known_labels())

    def take(self, index: Tensor) -> Victim:
        """The victim restricted to some examples of its batch."""
        raise ValueError("this victim cannot be restricted to a part of its batch")

    def relabelled(self, labels: Tensor) -> Victim:
        """The same victim with other labels, for targeted attacks."""
        raise ValueError("this attack chooses its targets, and the model under attack has no labels")

    def training(self) -> Victim:
        """The same model as it is trained, with gradients to its parameters, for an objective's own part of the loss.

        Raises:
            ValueError: the victim is not being trained.
        """
        raise ValueError("this objective differentiates in the parameters, and the model under attack is not trained")

    def undisturbed(self) -> AbstractContextManager[None]:
        """Inside, the model may be called at will; afterwards it is as before."""
        return nullcontext()

    def network(self) -> nn.Module:
        """The module that computes losses and logits, for attacks that name its parts.

        Raises:
            ValueError: the victim is a function, or does not show its module.
        """
        raise ValueError("this attack looks at the model's submodules, and the model under attack is no torch module")

    def reseeded(self, seed: int) -> AbstractContextManager[None]:
        """Inside, whatever the model draws from the global generators follows from ``seed``.

        For use within an attack, which puts the global generators back when it ends.
        """
        seed_global_rng(seed)
        return nullcontext()

    def known_labels(self) -> Tensor:
        """The labels.

        Raises:
            ValueError: the batch has none.
        """
        if self.labels is None:
            raise ValueError("this attack needs labels, and the batch has none")
        return self.labels


class ClassifierVictim(Victim):
    """Any callable from inputs to logits, attacked through its cross-entropy.

    Args:
        model: ``x -> logits (B, classes, ...)``; an ``nn.Module`` is left exactly as it was found.
        labels: class indices ``(B, ...)`` or class probabilities of the logits' shape.
        stop_when_fooled: see ``Victim``.

    Guarantees:
        Inside ``undisturbed()`` parameters take no gradients; afterwards parameters, ``.grad``, buffers,
        ``requires_grad`` and modes are as before, also after an exception.
    """

    provides = frozenset({"loss", "per_example_loss", "logits", "labels"})

    def __init__(self, model: Callable[[Tensor], Tensor], labels: Tensor, stop_when_fooled: bool = False) -> None:
        self.model, self.labels, self.stop_when_fooled = model, labels, stop_when_fooled

    def logits(self, x: Tensor) -> Tensor:
        return as_logits(self.model(x))

    def loss(self, x: Tensor) -> Tensor:
        return self.loss_and_logits(x)[0]

    def loss_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return classification_loss(logits, self.known_labels()), logits

    def take(self, index: Tensor) -> ClassifierVictim:
        return self._with_labels(self.known_labels()[index])

    def relabelled(self, labels: Tensor) -> ClassifierVictim:
        return self._with_labels(labels)

    def _with_labels(self, labels: Tensor) -> ClassifierVictim:
        other = copy.copy(self)
        other.labels = labels
        return other

    def network(self) -> nn.Module:
        return self.model if isinstance(self.model, nn.Module) else super().network()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        if not isinstance(self.model, nn.Module):
            yield
            return
        modes = [(m, m.training) for m in self.model.modules()]
        with frozen(self.model.parameters()), scratch_buffers(self.model):
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters take no gradients inside; ``requires_grad`` is as before afterwards."""
    trainable = [p for p in parameters if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def scratch_buffers(module: nn.Module) -> Iterator[None]:
    """The module writes into copies of its buffers inside; the originals come back untouched.

    Putting values back instead would not do: batch normalisation writes its running statistics without telling
    autograd, and a write of ours in between would invalidate graphs that are still to be differentiated.
    """
    copies: dict[int, Tensor] = {}
    originals = []
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and not m.training:
            continue  # reads its statistics, never writes them
        for name, buffer in m._buffers.items():
            if buffer is not None:
                originals.append((m, name, buffer))
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
    for m, name, buffer in originals:
        m._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for m, name, buffer in originals:
            m._buffers[name] = buffer


def as_logits(output: Tensor) -> Tensor:
    """Probabilities become their logarithms, so that a softmax in the model does not hide its gradient.

    Args:
        output: ``(B, classes, ...)`` scores; rows that lie in [0, 1] and sum to 1 are taken for probabilities.
    """
    if output.ndim < 2 or output.shape[1] < 2:
        return output
    with torch.no_grad():
        probabilities = bool((output >= 0).all()) and bool((output.sum(1) - 1).abs().max() < 1e-3)
    return output.clamp_min(torch.finfo(output.dtype).tiny).log() if probabilities else output


def is_binary(logits: Tensor, labels: Tensor) -> bool:
    """One score an example, labels 0 or 1: ``(B,)`` or ``(B, 1)`` logits against ``(B,)`` or ``(B, 1)`` labels."""
    return logits.numel() == logits.shape[0] == labels.numel() and bool(((labels == 0) | (labels == 1)).all())


def is_classification(logits: Tensor, labels: Tensor | None) -> bool:
    """Whether labels and scores fit: class indices (some may be ignored), class probabilities, or binary labels."""
    if labels is None or not logits.is_floating_point() or 0 in (logits.ndim, labels.ndim):
        return False
    if logits.shape[0] != labels.shape[0]:
        return False
    if is_binary(logits, labels):
        return True
    if logits.ndim < 2 or logits.shape[1] < 2:
        return False
    if labels.is_floating_point():
        rows = labels.sum(1) if labels.shape == logits.shape else labels.new_zeros(1)
        return bool((labels >= 0).all()) and bool((rows - 1).abs().max() < 1e-3)
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        return False
    known = _known(labels, logits.shape[1])
    ignored = torch.isin(labels, labels.new_tensor(IGNORED))
    return bool((known | ignored).all()) and bool(known.any())


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example ``(B,)``; dense predictions are averaged over the positions that have a label.

    Raises:
        ValueError: one score an example, and labels that are not 0 or 1.
    """
    if is_binary(logits, labels):
        return F.binary_cross_entropy_with_logits(logits.flatten(), labels.flatten().to(logits.dtype), reduction="none")
    if logits.numel() == logits.shape[0]:
        raise ValueError("the model has one score an example, but the labels are not all 0 or 1: is it a regression?")
    if labels.is_floating_point():
        each, known = F.cross_entropy(logits, labels.to(logits.dtype), reduction="none"), None
    else:
        known = _known(labels, logits.shape[1])
        each = F.cross_entropy(logits, labels.long().masked_fill(~known, -100), reduction="none")
    return _mean_over_positions(each, known)


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of each example's predictions that is right, float32 ``(B,)``; 0 or 1 for plain classification."""
    if is_binary(logits, labels):
        return ((logits.flatten() > 0) == (labels.flatten() > 0.5)).float()
    if labels.is_floating_point():
        return _mean_over_positions((logits.argmax(1) == labels.argmax(1)).float(), None)
    known = _known(labels, logits.shape[1])
    return _mean_over_positions(((logits.argmax(1) == labels) | ~known).float() * known, known, empty=1.0)


IGNORED = (-100, 255)  # usual marks of positions without a label


def _known(labels: Tensor, classes: int) -> Tensor:
    return (labels >= 0) & (labels < classes)


def _mean_over_positions(each: Tensor, known: Tensor | None, empty: float = 0.0) -> Tensor:
    """``(B, ...)`` to ``(B,)``, over the positions that have a label; ``empty`` where an example has none."""
    if known is None:
        return each.flatten(1).mean(1) if each.ndim > 1 else each
    each, known = each.reshape(len(each), -1), known.reshape(len(known), -1)
    count = known.sum(1)
    return torch.where(count > 0, each.sum(1) / count.clamp_min(1), torch.full_like(each[:, 0], empty))


def input_gradient(victim: Victim, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of the victim's loss in its input, and nothing else: no parameter's ``.grad`` is written.

    In fp16 the gradient of a mean over many examples is too small to be represented, and one that is scaled against
    that may become too large. The loss is therefore differentiated times ``victim.gradient_scale``; where fp16 is at
    work and nobody gave a factor, times 1024; where the gradient is not finite, times less. Examples that are left
    without a gradient are given the one that a larger factor finds, if any does. What was found to work holds for the
    victim's later gradients.

    Args:
        victim: what is under attack.
        x: where to differentiate ``(B, ...)``.

    Returns:
        gradient ``(B, ...)`` of the loss itself, float32 where ``x`` is fp16, with entries that are not finite
        replaced; the loss, detached; and, where ``victim.stop_when_fooled``, the score of each example ``(B,)``, else
        None.

    Raises:
        ValueError: the loss does not depend on the input.
    """
    x = x.detach().requires_grad_(True)
    found = _scale_of(victim)
    loss, score, grad, others = _differentiated(victim, x, found.value)
    if not found.fixed:
        if not found.searched and found.value == 1.0 and is_half(x, loss):
            found.value = START
            loss, score, grad, others = _differentiated(victim, x, found.value)
        while found.value > 1.0 and not bool(grad.isfinite().all()):
            found.value = max(1.0, found.value / LOWER)
            loss, score, grad, others = _differentiated(victim, x, found.value)
    if victim.harvest is not None:
        victim.harvest.add(loss, others, found.value)
    grad = unscaled(grad, found.value)
    if not found.fixed:
        for factor in found.larger():
            lost = ~any_in_row(grad != 0)
            if not bool(lost.any()):
                break
            again = _differentiated(victim, x, factor)[2]
            saved = lost & any_in_row(again != 0) & ~any_in_row(~again.isfinite())
            if not bool(saved.any()):
                break
            grad = torch.where(saved.view(-1, *[1] * (x.ndim - 1)), unscaled(again, factor), grad)
            found.note(factor, alone=bool(again.isfinite().all()))
        found.searched = True
    grad = torch.nan_to_num(grad)
    if victim.gradients is not None:
        victim.gradients.append(grad.any())
    return grad, loss.detach(), score


def _differentiated(
    victim: Victim, x: Tensor, scale: float
) -> tuple[Tensor, Tensor | None, Tensor, Sequence[Tensor | None]]:
    """Loss, score, and the gradients of ``scale`` times the loss in ``x`` and in what is harvested."""
    wanted = [] if victim.harvest is None else list(victim.harvest.parameters)
    score = None
    with torch.enable_grad():
        if victim.stop_when_fooled:
            loss, logits = victim.loss_and_logits(x)
            score = correctness(logits.detach(), victim.known_labels())
        else:
            loss = victim.loss(x)
        if not loss.requires_grad:
            raise ValueError(_NO_PATH)
        total = loss.sum() if scale == 1.0 else loss.float().sum() * scale
        grad, *others = torch.autograd.grad(total, [x, *wanted], allow_unused=True)
    if grad is None:
        raise ValueError(_NO_PATH)
    return loss, score, grad, others


def _scale_of(victim: Victim) -> LossScale:
    """What was found for this victim; parts that are made of it later share it."""
    if victim.found_scale is None:
        victim.found_scale = LossScale(victim.gradient_scale)
    return victim.found_scale


_NO_PATH = (
    "the loss does not depend on the attacked input (is it detached, converted to integers, or is another part of the "
    'batch the real input?). Name the input with inputs="…", or attack the model behind the non-differentiable step.'
)
