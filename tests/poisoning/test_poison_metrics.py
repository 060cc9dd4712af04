"""The numbers that say what a poison achieved and what a filter found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robust_train.poisoning.metrics import TriggerSuccessRate, detection, trigger_success
from robust_train.poisoning.poisons.badnets import BadNets


def test_examples_of_the_wanted_class_do_not_count():
    metric = TriggerSuccessRate()
    labels, wanted = torch.tensor([0, 1, 2, 3]), torch.zeros(4, dtype=torch.int64)
    metric.update(torch.tensor([0, 0, 0, 3]), labels, wanted)
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.update(torch.eye(4), labels, wanted)  # scores: all right, so no success
    assert float(metric.compute()) == pytest.approx(2 / 6)


def test_the_rate_is_nan_where_nothing_could_succeed():
    metric = TriggerSuccessRate()
    metric.update(
        torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    )
    assert math.isnan(metric.compute())


def test_wrong_shapes_are_refused():
    three = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be as many, got 3, 3 and 2"):
        TriggerSuccessRate().update(three, three, three[:2])
    with pytest.raises(ValueError, match="predictions must be class indices"):
        TriggerSuccessRate().update(torch.rand(3), three, three)


class Backdoored(nn.Module):
    """Right on clean digits of one pixel a class; class 0 whenever the last pixel is bright."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        logits = self.dropout(x[:, 0, 0, :4]).clone()
        logits[:, 0] += 9 * x[:, 0, -1, -1]
        return logits


def test_a_known_backdoor_is_measured_in_eval_mode():
    y = torch.arange(12) % 4
    x = torch.zeros(12, 1, 8, 8)
    x[torch.arange(12), 0, 0, y] = 1
    model = Backdoored()
    batches = [(x[:7], y[:7], "more"), (x[7:], y[7:], "more")]
    assert trigger_success(model, batches, BadNets(), 4) == {"asr": 1.0, "clean_acc": 1.0}
    assert model.training
    assert model.dropout.training
    assert trigger_success(model, batches, BadNets(position="center"), 4) == {"asr": 0.0, "clean_acc": 1.0}
    assert trigger_success(model, batches, BadNets(target=None), 4)["asr"] == pytest.approx(3 / 12)  # only 3 -> 0
    with pytest.raises(ValueError, match="nothing to measure"):
        trigger_success(model, [], BadNets(), 4)


def test_detection_counts():
    mask = torch.tensor([True, True, False, False, False])
    found = detection(mask, torch.tensor([True, False, True, False, False]))
    assert found == {"tpr": 0.5, "fpr": pytest.approx(1 / 3), "precision": 0.5}
    assert detection(mask, mask) == {"tpr": 1.0, "fpr": 0.0, "precision": 1.0}
    assert math.isnan(detection(mask, torch.zeros_like(mask))["precision"])
    assert math.isnan(detection(torch.zeros_like(mask), mask)["tpr"])
    with pytest.raises(ValueError, match="must be bool"):
        detection(mask, torch.ones(5))
    with pytest.raises(ValueError, match="must be bool"):
        detection(mask, mask[:4])
