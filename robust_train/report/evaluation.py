"""What an evaluation says beyond its table: intervals, flags, rates by class and by group, natural corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import _svg as svg
from .charts import Series, line_chart

Results = Mapping[str, Mapping[str, Any]]
NOTHING = "sanity checks: nothing found"
MOST_ROWS = 40  # of a chart of classes or groups


def findings(results: Results) -> list[str]:
    """Sentences on each model that has an ``evaluation``, as ``Evaluation.as_dict()`` makes it; flags last."""
    plain, flags = [], []
    for name, result in results.items():
        evaluation = result.get("evaluation")
        if not evaluation:
            continue
        rate = evaluation["rates"]["robust_acc"]
        draws = f", each the mean over {evaluation['draws']} random draws" if evaluation["draws"] > 1 else ""
        plain.append(f"{name}: worst case {_rate(rate)} of {rate['n']} examples (95 % interval{draws}).")
        for what in ("class", "group"):
            if parts := evaluation[f"by_{what}"]:
                hardest = min(parts, key=lambda part: parts[part]["robust_acc"]["value"])
                plain.append(f"{name}: hardest {what} {hardest}, worst case {_rate(parts[hardest]['robust_acc'])}.")
        if evaluation["corruption_acc"] is not None:
            plain.append(f"{name}: {_percent(evaluation['corruption_acc'])} under natural corruptions, on average.")
        flags += [f"{name}: WARNING, {_flag(flag)}" for flag in evaluation["flags"]]
        if evaluation["checked"] and not evaluation["flags"]:
            flags.append(f"{name}: {NOTHING}.")
    return plain + flags


def findings_card(results: Results, width: int = 880) -> str | None:
    """The same as a drawing, flags in the colour of what is wrong; None where there is nothing to say."""
    sentences = findings(results)
    if not sentences:
        return None
    flagged = sum("WARNING" in sentence for sentence in sentences)
    title = "Warnings: the numbers may be too high" if flagged else "What else was measured"
    body, y = svg.heading(title, "", width)
    parts = [body]
    for sentence in sentences:
        colour = svg.WRONG if "WARNING" in sentence else svg.INK
        for i, line in enumerate(svg.lines(sentence, width - 84, 13, limit=5)):
            y += 20
            parts.append(svg.text(line, 32 if i == 0 else 48, y, size=13, fill=colour))
        y += 3
    return svg.drawing(width, y + 20, title, "".join(parts))


def parts_chart(results: Results, what: str) -> str | None:
    """Robust accuracy of each class or group with its interval, one row each; None where there are none.

    Args:
        results: as in ``findings``.
        what: ``"class"`` or ``"group"``.
    """
    found = {n: r["evaluation"][f"by_{what}"] for n, r in results.items() if r.get("evaluation")}
    rows = list(dict.fromkeys(part for parts in found.values() for part in parts))
    if len(rows) < 2 or len(rows) > MOST_ROWS:
        return None
    width, left, right, lines = 880, 150, 815, len(found)
    title = f"Worst case by {what}"
    subtitle = "Filled: under attack, with its 95 % interval. Hollow: clean. " + ", ".join(
        f"{name} in {('vermilion', 'blue', 'green')[i % 3]}" for i, name in enumerate(found)
    )
    body, top = svg.heading(title, subtitle + ".", width)
    step = 10 + 12 * lines
    bottom = top + 10 + step * len(rows)

    def x(share: float) -> float:
        return left + share * (right - left)

    parts = [body]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(svg.element("line", x1=x(tick), x2=x(tick), y1=top + 6, y2=bottom, stroke=svg.RULE))
        parts.append(svg.text(_percent(tick), x(tick), bottom + 18, fill=svg.MUTED, text_anchor="middle"))
    for i, row in enumerate(rows):
        middle = top + 14 + step * i + 6 * lines
        label = svg.shorten(f"{what} {row}", left - 48, 12)
        parts.append(svg.text(label, left - 12, middle + 4, text_anchor="end"))
        for j, rates in enumerate(found.values()):
            if row in rates:
                y = middle + 12 * (j - (lines - 1) / 2)
                parts.append(_row(rates[row], x, y, svg.PALETTE[j % 3]))
    return svg.drawing(width, int(bottom) + 36, title, "".join(parts))


def corruption_charts(results: Results) -> list[str]:
    """Accuracy under each natural corruption as it gets more severe, one chart a model."""
    charts = []
    for name, result in results.items():
        rates = (result.get("evaluation") or {}).get("corruptions") or {}
        kinds: dict[str, list[tuple[int, float]]] = {}
        for key, rate in rates.items():
            kind, _, severity = key.partition("/")
            kinds.setdefault(kind, []).append((int(severity), rate["value"]))
        if not kinds:
            continue
        mean = _percent(result["evaluation"]["corruption_acc"])
        charts.append(
            line_chart(
                [Series(kind.replace("_", " "), *zip(*sorted(points), strict=True)) for kind, points in kinds.items()],
                title=f"Natural corruptions: {name}",
                subtitle=f"No attacker: noise, blur, light, pixels, compression. On average {mean} are right.",
                x_label="severity",
                y_label="accuracy",
                percent=True,
            )
        )
    return charts


def curve_series(name: str, result: Mapping[str, Any]) -> Series | None:
    """Accuracy against eps, with its interval where that is known; None where there is no curve."""
    points: Sequence[Mapping[str, Any]] = (result.get("evaluation") or {}).get("curve") or []
    if points:
        x, y, low, high = ([point[key] for point in points] for key in ("eps", "value", "low", "high"))
        return Series(name, x, y, low, high)
    return Series(name, *zip(*result["curve"], strict=True)) if result.get("curve") else None


def _row(rates: Mapping[str, Mapping[str, float]], x: Any, y: float, colour: str) -> str:
    robust, clean = rates["robust_acc"], rates["clean_acc"]
    says = f"clean {_rate(clean)}, worst case {_rate(robust)}, {robust['n']} examples"
    line = svg.element("line", x1=x(robust["low"]), x2=x(robust["high"]), y1=y, y2=y, stroke=colour, stroke_width=2)
    dot = svg.element("circle", svg.tooltip(says), cx=x(robust["value"]), cy=y, r=4.5, fill=colour)
    hollow = svg.element(
        "circle", svg.tooltip(says), cx=x(clean["value"]), cy=y, r=4, fill=svg.PAPER, stroke=colour, stroke_width=1.5
    )
    return line + hollow + dot


def _flag(flag: Mapping[str, Any]) -> str:
    return f"{flag['name']}: {flag['says']}; {flag['advice']}."


def _rate(rate: Mapping[str, float]) -> str:
    return f"{_percent(rate['value'])} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
