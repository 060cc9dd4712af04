"""What an evaluation says beyond its table, in words and in drawings."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from robust_train.report import comparison
from robust_train.report.evaluation import corruption_charts, curve_series, findings, findings_card, parts_chart


def rate(value: float, n: int = 100) -> dict:
    return {
        "value": value,
        "low": max(value - 0.1, 0),
        "high": min(value + 0.1, 1),
        "n": n,
        "interval": "clopper-pearson",
    }


FLAG = {"name": "zero_gradients", "says": "<b>90 %</b> have none", "advice": "attack with BPDA", "evidence": {}}


def result(**changes) -> dict:
    parts = {str(i): {"clean_acc": rate(0.9, 10), "robust_acc": rate(0.3 + i / 20, 10)} for i in range(3)}
    evaluation = {
        "n": 100,
        "threat": "Linf ball",
        "draws": 1,
        "rates": {"clean_acc": rate(0.9), "robust_acc": rate(0.4)},
        "curve": [{"eps": 0.0, **rate(0.9)}, {"eps": 0.1, **rate(0.4)}],
        "by_class": parts,
        "by_group": {},
        "corruptions": {f"jpeg/{s}": rate(0.8 - s / 10) for s in (1, 2, 3)},
        "corruption_acc": 0.6,
        "flags": [],
        "checked": True,
        **changes,
    }
    return {
        "clean_acc": 0.9,
        "robust_acc": 0.4,
        "robust_acc_pgd": 0.4,
        "curve": [[0.0, 0.9], [0.1, 0.4]],
        "evaluation": evaluation,
    }


def drawn(svg: str) -> str:
    """The words of a drawing, which must be well-formed."""
    return " ".join(ElementTree.fromstring(svg).itertext())  # noqa: S314


def test_sentences_name_intervals_the_hardest_part_and_that_nothing_was_found():
    assert findings({"net": result()}) == [
        "net: worst case 40.0 % [30.0, 50.0] of 100 examples (95 % interval).",
        "net: hardest class 0, worst case 30.0 % [20.0, 40.0].",
        "net: 60.0 % under natural corruptions, on average.",
        "net: sanity checks: nothing found.",
    ]
    assert findings({"net": result(checked=False, corruption_acc=None, by_class={})}) == [
        "net: worst case 40.0 % [30.0, 50.0] of 100 examples (95 % interval)."
    ]
    assert "each the mean over 10 random draws" in findings({"net": result(draws=10)})[0]
    assert findings({"loss": {"clean_loss": 1.0}}) == []


def test_warnings_come_last_and_are_marked_wherever_results_are_shown():
    results = {"a": result(flags=[FLAG]), "b": result()}
    said = findings(results)
    assert said[-2:] == [
        "a: WARNING, zero_gradients: <b>90 %</b> have none; attack with BPDA.",
        "b: sanity checks: nothing found.",
    ]
    assert said[-2] in comparison.as_table(results, "Linf ball")
    card = findings_card(results)
    assert card is not None
    assert "Warnings: the numbers may be too high" in drawn(card)
    assert "<b>" not in card
    assert "zero_gradients" in drawn(comparison.figure(results, threat="Linf ball", eps=0.1, rows=None))
    quiet = findings_card({"b": result()})
    assert quiet is not None
    assert "Warnings" not in drawn(quiet)
    assert findings_card({"b": {"clean_loss": 1.0}}) is None


def test_classes_and_groups_are_drawn_with_both_models():
    results = {"a": result(), "b": result(by_group={"x<y": {"clean_acc": rate(1), "robust_acc": rate(0)}})}
    words = drawn(parts_chart(results, "class") or "")
    assert all(f"class {i}" in words for i in range(3))
    assert "a in vermilion, b in blue" in words
    assert "clean 90.0 % [80.0, 100.0], worst case 30.0 % [20.0, 40.0], 10 examples" in words
    assert parts_chart(results, "group") is None  # one group says nothing that the whole does not
    many = {str(i): {"clean_acc": rate(1), "robust_acc": rate(0)} for i in range(100)}
    assert parts_chart({"a": result(by_class=many)}, "class") is None


def test_corruptions_and_curves():
    results = {"a": result(), "b": result(corruptions={})}
    (chart,) = corruption_charts(results)
    assert "Natural corruptions: a" in drawn(chart)
    assert "60.0 % are right" in drawn(chart)
    line = curve_series("a", results["a"])
    assert line is not None
    assert line.low == pytest.approx((0.8, 0.3))
    plain = curve_series("a", {"curve": [[0.0, 1.0], [0.1, 2.0]]})
    assert plain is not None
    assert plain.low is None
    assert curve_series("a", {"curve": []}) is None
