"""Objectives, metrics and the evaluation of plain torch models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize

from robust_train import PGD, PGDAT, TRADES, AttackSuccessRate, RobustAccuracy, Threat, UniformNoise, evaluate
from robust_train.config import build
from robust_train.evasion.objectives.trades import prediction_divergence
from robust_train.evasion.victim import as_logits, classification_loss, correctness, is_classification
from robust_train.hydra_plugin import config_dir, register

OBJECTIVES = sorted((config_dir("conf") / "objective").glob("*.yaml"))


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda p: p.stem)
def test_objective_contract(path):
    register()
    with initialize(config_path=None, version_base="1.3"):
        mounts = "hydra.searchpath=[robust-train://,robust-train://robust_train]"
        objective = build(compose(overrides=[mounts, f"+objective={path.stem}"]).objective)
    assert objective.trains_on in ("adversarial", "clean")
    assert 0 <= objective.own_weight <= 1
    assert objective.extra_passes >= 0
    assert objective.needs <= {"loss", "per_example_loss", "logits", "labels"}
    with pytest.raises(AttributeError):
        objective.anything = 1


@pytest.mark.parametrize("bad", [lambda: PGDAT(clean_weight=1.0), lambda: PGDAT(-0.1), lambda: TRADES(-1)])
def test_bad_objectives_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        bad()


def test_divergence_is_the_kl_and_zero_with_zero_gradient_at_equality():
    p, q = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True)
    want = F.kl_div(F.log_softmax(q, 1), F.softmax(p, 1), reduction="none").sum(1)
    assert torch.allclose(prediction_divergence(p, q), want, atol=1e-6)
    same = p.clone().requires_grad_(True)
    loss = prediction_divergence(p, same).sum()
    loss.backward()
    assert abs(float(loss)) < 1e-6
    assert float(same.grad.abs().max()) < 1e-6
    assert prediction_divergence(torch.randn(3, 1), torch.randn(3, 1)).shape == (3,)
    assert prediction_divergence(torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)).shape == (3,)


def test_robust_accuracy_counts_survivors_of_every_attack():
    target = torch.tensor([0, 1, 2, 0])
    first, second = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 2, 2, 0])
    metric = RobustAccuracy()
    metric.update({"a": first, "b": second}, target)
    assert float(metric.compute()) == 0.5
    assert float(metric(first, target)) == 0.75  # this batch alone
    assert float(metric.compute()) == 5 / 8
    scores = torch.nn.functional.one_hot(first, 3).float()
    assert float(RobustAccuracy()(scores, target)) == 0.75
    with pytest.raises(ValueError, match="at least one attack"):
        metric.update([], target)


def test_attack_success_rate_is_of_those_that_were_right():
    target, clean = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 0])
    metric = AttackSuccessRate()
    metric.update(clean, torch.tensor([0, 0, 0, 1]), target)
    assert float(metric.compute()) == pytest.approx(2 / 3)


def test_the_success_rate_of_a_trigger_is_of_those_that_are_not_of_the_wanted_class():
    target, wanted = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 3, 3])
    metric = AttackSuccessRate()
    metric.update(None, torch.tensor([3, 3, 0, 3]), target, wanted)
    assert float(metric.compute()) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="wanted"):
        metric.update(None, torch.tensor([3]), torch.tensor([0]))


def test_what_counts_as_a_classification():
    assert is_classification(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert is_classification(torch.randn(4, 3, 5, 5), torch.zeros(4, 5, 5, dtype=torch.long))
    assert is_classification(torch.randn(4, 3), torch.softmax(torch.randn(4, 3), 1))
    assert is_classification(torch.randn(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert not is_classification(torch.randn(4, 1), torch.randn(4))
    assert not is_classification(torch.randn(4, 3), torch.randn(4, 3))
    assert not is_classification(torch.randn(4, 3), None)
    assert not is_classification(torch.randn(4, 8), torch.zeros(4, 3, dtype=torch.long))


def test_losses_and_scores_of_each_kind():
    soft = torch.softmax(torch.randn(4, 3), 1)
    assert classification_loss(torch.randn(4, 3), soft).shape == (4,)
    assert classification_loss(torch.randn(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.long)).shape == (4,)
    dense = torch.zeros(1, 2, 2, 2)
    dense[0, 1, 0] = 1.0  # class 1 in the first row
    assert correctness(dense, torch.tensor([[[1, 0], [0, 0]]])).tolist() == [0.75]
    assert correctness(torch.tensor([[0.3], [-0.3]]), torch.tensor([1.0, 1.0])).tolist() == [1.0, 0.0]


def test_probabilities_are_recognised():
    logits = torch.randn(6, 4)
    recovered = as_logits(torch.softmax(logits, 1))
    assert torch.allclose(torch.softmax(recovered, 1), torch.softmax(logits, 1), atol=1e-6)
    assert as_logits(logits) is logits


def test_evaluate_any_torch_module(net, images):
    net.train()
    labels = net.eval()(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # one clean mistake
    net.train()
    loader = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    attacks = {"noise": UniformNoise(), "pgd": PGD(steps=10)}
    result = evaluate(net, loader, Threat(eps=0.3), attacks)
    assert net.training
    assert result.n == 12
    assert result.clean_acc == pytest.approx(11 / 12)
    assert result.robust_acc <= min(result.robust_acc_by_attack.values()) <= result.clean_acc
    assert result.robust_acc_by_attack["pgd"] < result.robust_acc_by_attack["noise"]
    assert result == evaluate(net, loader, Threat(eps=0.3), attacks)  # reproducible
    assert evaluate(net, loader, Threat(eps=0.0), PGD(steps=2)).robust_acc == result.clean_acc
    assert evaluate(net, loader, Threat(eps=0.3), limit=5).n == 5
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(net, [], Threat())
    with pytest.raises(ValueError, match=r"threat\.mean"):
        evaluate(net, [(images * 4 - 2, labels)], Threat())
