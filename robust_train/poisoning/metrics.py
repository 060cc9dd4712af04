"""How well a poison works, and how well it is found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from robust_train.poisoning.poisons.backdoor import Backdoor


class TriggerSuccessRate(Metric):
    """Of the triggered examples whose class is not the wanted one, the share that is predicted as wanted.

    Shapes: ``update(preds, labels, wanted)``: predictions of triggered inputs, class indices ``(B,)`` or scores
    ``(B, classes)``; true labels ``(B,)``; labels that the attacker wants ``(B,)``. ``compute()`` is a scalar in
    [0, 1], NaN while there is no such example.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    hits: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, labels: Tensor, wanted: Tensor) -> None:
        predicted = _predicted(preds)
        if not predicted.shape == labels.shape == wanted.shape:
            raise ValueError(
                "predictions, labels and wanted labels must be as many, got "
                f"{len(predicted)}, {len(labels)} and {len(wanted)}"
            )
        attacked = labels != wanted
        self.hits += (attacked & (predicted == wanted)).sum()
        self.total += attacked.sum()

    def compute(self) -> Tensor:
        return self.hits / self.total


def trigger_success(model: nn.Module, loader: Iterable[Any], poison: Backdoor, classes: int) -> dict[str, float]:
    """Measure what a backdoor achieved, on any torch classifier.

    Args:
        model: ``x -> logits (B, classes)``; judged in eval mode, and put back into the mode it was in.
        loader: yields clean test batches ``(x, labels, ...)``.
        poison: the backdoor that the training data were poisoned with.
        classes: how many classes there are.

    Returns:
        ``asr``, see ``TriggerSuccessRate``, and ``clean_acc``, the accuracy without trigger.

    Raises:
        ValueError: the loader is empty, or the trigger does not fit onto its inputs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    success, right, n = TriggerSuccessRate().to(device), 0, 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for x, labels, *_ in loader:
                x, labels = x.to(device), labels.to(device)
                success.update(model(poison.apply_trigger(x)), labels, poison.wanted(labels, classes))
                right += int((_predicted(model(x)) == labels).sum())
                n += len(x)
    finally:
        for module, training in modes:
            module.training = training
    if n == 0:
        raise ValueError("there is nothing to measure: the loader is empty")
    return {"asr": float(success.hits / success.total), "clean_acc": right / n}


def detection(mask: Tensor, flagged: Tensor) -> dict[str, float]:
    """How well a filter found the poisoned rows.

    Args:
        mask: which rows are poisoned, bool ``(N,)``.
        flagged: which rows the filter flagged, bool ``(N,)``.

    Returns:
        ``tpr``, share of the poisoned rows that were flagged; ``fpr``, share of the others that were flagged;
        ``precision``, share of the flagged rows that are poisoned. NaN where there is none to take a share of.

    Raises:
        ValueError: they are not bool ``(N,)`` both.
    """
    if not (mask.dtype == flagged.dtype == torch.bool and mask.shape == flagged.shape and mask.ndim == 1):
        raise ValueError(
            f"mask and flagged must be bool (N,), got {mask.dtype} {tuple(mask.shape)} and "
            f"{flagged.dtype} {tuple(flagged.shape)}"
        )
    flagged = flagged.to(mask.device)
    found = (mask & flagged).sum()
    return {
        "tpr": float(found / mask.sum()),
        "fpr": float((~mask & flagged).sum() / (~mask).sum()),
        "precision": float(found / flagged.sum()),
    }


def _predicted(preds: Tensor) -> Tensor:
    """Class indices ``(B,)`` from class indices ``(B,)`` or scores ``(B, classes)``."""
    if preds.ndim == 1 and not preds.is_floating_point():
        return preds
    if preds.ndim == 2 and preds.shape[1] > 1:
        return preds.argmax(1)
    raise ValueError(f"predictions must be class indices (B,) or scores (B, classes), got {tuple(preds.shape)}")
