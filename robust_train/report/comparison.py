"""Runs side by side: a table for the terminal, rows for a spreadsheet, and a figure to look at."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import line_chart
from .evaluation import corruption_charts, curve_series, findings, findings_card, parts_chart
from .pages import page
from .pictures import Tile, diverging, image_grid

Results = Mapping[str, Mapping[str, Any]]


def _kind(results: Results) -> str:
    return "acc" if all("robust_acc" in r for r in results.values()) else "loss"


def _columns(results: Results) -> list[tuple[str, str]]:
    """Metric and heading of every column: clean, each attack, and the worst case over them."""
    kind = _kind(results)
    attacks = dict.fromkeys(
        key.removeprefix(f"robust_{kind}_") for r in results.values() for key in r if key.startswith(f"robust_{kind}_")
    )
    named = [(f"robust_{kind}_{attack}", attack) for attack in attacks]
    return [(f"clean_{kind}", "clean"), *named, (f"robust_{kind}", "worst case")]


def _shown(value: Any, kind: str) -> str:
    if value is None:
        return "not run"
    return f"{100 * value:.1f} %" if kind == "acc" else f"{value:.4g}"


def _is_private(results: Results) -> bool:
    return any("epsilon" in r for r in results.values())


def _epsilon(result: Mapping[str, Any]) -> str:
    """Rounded up: what is shown must not be less than what was proved."""
    if "epsilon" not in result:
        return "none"
    value = result["epsilon"]
    return "void" if value is None else f"{math.ceil(100 * value) / 100:.2f} (delta {result['delta']:.1g})"


# what only some recipes measure
EXTRA = {"verified_acc": "verified", "attack_success_rate": "trigger works", "filter_kept": "rows kept"}
SHARES = ("verified_acc", "attack_success_rate")


def _extra(results: Results) -> list[str]:
    return [key for key in EXTRA if any(key in r for r in results.values())]


def _extra_shown(key: str, result: Mapping[str, Any]) -> str:
    if key not in result:
        return "all" if key == "filter_kept" else "not measured"
    return f"{100 * result[key]:.1f} %" if key in SHARES else str(result[key])


def as_table(results: Results, threat: str) -> str:
    """A plain-text table: one row a run, one column an attack. Beneath it what else was found, flags last.

    Args:
        results: metrics of each run by name: ``clean_acc``, ``robust_acc``, ``robust_acc_<attack>`` (or ``…_loss``);
            ``epsilon`` and ``delta`` of a run that was trained privately; ``attack_success_rate`` of a simulated
            trigger, ``filter_kept``, rows that a filter kept, and ``verified_acc``, what bounds of the logits prove.
        threat: the threat in words, for the heading.
    """
    kind, columns, private = _kind(results), _columns(results), _is_private(results)
    extra = _extra(results)
    head = ["", *(heading for _, heading in columns), *(["epsilon"] if private else [])]
    timed = any("train_seconds" in r for r in results.values())
    head += [*(EXTRA[key] for key in extra), *(["training"] if timed else [])]
    body = [
        [
            name,
            *(_shown(r.get(key), kind) for key, _ in columns),
            *([_epsilon(r)] if private else []),
            *(_extra_shown(key, r) for key in extra),
            *([f"{r['train_seconds']:.0f} s"] if timed else []),
        ]
        for name, r in results.items()
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *body]
    ]
    what = "accuracy" if kind == "acc" else "loss"
    notes = findings(results)
    table = [f"Test {what} within the {threat}", rows[0], "-" * len(rows[0]), *rows[1:]]
    return "\n".join([*table, *([""] if notes else []), *notes])


def as_csv(results: Results) -> str:
    """The same numbers, unrounded, one row a run."""
    columns = [key for key, _ in _columns(results)] + (["epsilon", "delta"] if _is_private(results) else [])
    columns += _extra(results)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *columns, "train_seconds"])
    for name, r in results.items():
        writer.writerow([name, *(r.get(key, "") for key in columns), r.get("train_seconds", "")])
    return out.getvalue()


def figure(results: Results, *, threat: str, eps: float, rows: Sequence[Mapping[str, Any]] | None) -> str:
    """Accuracy against eps, what speaks against trusting it, rates by class, and clean and adversarial examples; one
    self-contained SVG.

    Args:
        results: as in ``as_table``, each with ``curve``: points ``[eps, value]``, and of a classification with
            ``evaluation``, what ``Evaluation.as_dict()`` returns.
        threat: the threat in words.
        eps: the radius that was trained against.
        rows: for each run ``name``, ``labels``, and ``clean`` and ``attacked`` with ``images`` (N, C, H, W) in pixels
            and ``predicted`` classes; None leaves the pictures out.
    """
    kind, parts = _kind(results), []
    lines = [line for name, result in results.items() if (line := curve_series(name, result)) is not None]
    if lines:
        parts.append(
            line_chart(
                lines,
                title="Accuracy as the attacker gets stronger"
                if kind == "acc"
                else "Loss as the attacker gets stronger",
                subtitle="Test set; PGD-20 at every radius but 0, which is clean. Bands: 95 % intervals.",
                x_label="eps (pixels, in the threat's norm)",
                y_label="accuracy under attack" if kind == "acc" else "loss under attack",
                percent=kind == "acc",
                marks=[(eps, "the threat")],
            )
        )
    parts += [card] if (card := findings_card(results)) is not None else []
    parts += [chart for what in ("class", "group") if (chart := parts_chart(results, what)) is not None]
    parts += corruption_charts(results)
    if rows:
        parts.append(_pictures(rows, eps))
    table = as_table(results, threat).split("\n")
    return page(parts, title="What the defence bought", subtitle=table[0] + ".", footer="\n".join(_sentences(results)))


def _sentences(results: Results) -> list[str]:
    kind = _kind(results)
    return [
        f"{name}: " + ", ".join(f"{heading} {_shown(r.get(key), kind)}" for key, heading in _columns(results)) + "."
        for name, r in results.items()
    ]


def _pictures(rows: Sequence[Mapping[str, Any]], eps: float) -> str:
    """Clean images first; then for each run what the attack made of them, and the perturbation."""
    labels = rows[0]["labels"]
    clean = rows[-1]["clean"]
    grid = [_tiles(clean["images"], clean["predicted"], labels)]
    names = [f"clean\nseen by {rows[-1]['name']}"]
    for row in rows:
        grid.append(_tiles(row["attacked"]["images"], row["attacked"]["predicted"], labels))
        names.append(f"attacked\nseen by {row['name']}")
        moved = row["attacked"]["images"] - row["clean"]["images"]
        limit = max(float(abs(moved).max()), 1e-6)
        grid.append([Tile(diverging(delta, limit=limit)) for delta in moved])
        names.append(f"perturbation\nlargest {limit:.3g}")
    return image_grid(
        grid,
        title="What the attacker makes of the first test image of a class",
        subtitle="Beneath each image the class that the model sees. Each attack is against the model it is shown to.",
        row_labels=names,
        column_titles=[f"class {label}" for label in labels],
    )


def _tiles(images: Any, predicted: Sequence[int], labels: Sequence[int]) -> list[Tile]:
    return [
        Tile(image.clip(0, 1), caption=str(p), correct=p == label)
        for image, p, label in zip(images, predicted, labels, strict=True)
    ]
