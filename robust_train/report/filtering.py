"""What filters made of a training set: histograms of their scores, the most suspicious rows, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from robust_train.poisoning.records import (
    DECISIONS_FILE,
    DOWNWEIGHT,
    DROP,
    KEEP,
    PICTURES_FILE,
    QUARANTINE,
    REPORT_FILE,
    Column,
    Decisions,
    read_decisions,
    read_report,
    summary,
)

from . import _svg as svg
from .histogram import histogram
from .pictures import Tile

PICTURES = 100  # pictures of a page, at most
LARGEST = 1 << 26  # bytes of a file of pictures that is read
CLASSES = 30  # lines of the table of classes
OUT = {DROP: "dropped", QUARANTINE: "quarantined", DOWNWEIGHT: "drawn less often"}


def score_histogram(column: Column, *, canaries: Sequence[float] | np.ndarray = (), width: int = 880) -> str:
    """How a filter's scores are distributed, where its threshold lies, and what it flagged.

    Args:
        column: the filter's verdict.
        canaries: scores of rows that were made suspicious on purpose, drawn as an outline.
        width: in pixels.

    Returns:
        An SVG document.

    Raises:
        ValueError: a canary's score is not finite.
    """
    planted = np.asarray(canaries, dtype=float)
    return histogram(
        [("all rows", column.scores), ("flagged", column.scores[column.flagged])],
        title=f"Scores of {column.name}",
        x_label="suspicion score",
        outlines=[(f"canaries ({len(planted):,})", planted)] if len(planted) else [],
        marks=[] if column.threshold is None else [(column.threshold, f"threshold {column.threshold:.4g}")],
        width=width,
    )


def suspicious_grid(
    images: np.ndarray,
    captions: Sequence[str],
    *,
    out: Sequence[bool] | None = None,
    title: str = "The most suspicious rows",
    subtitle: str = "",
    columns: int = 8,
    tile: int = 86,
) -> str:
    """Pictures with a few words beneath each.

    Args:
        images: floats in [0, 1], ``(M, C, H, W)`` with one or three channels.
        captions: for each; line breaks part it into lines, of which the first stands out.
        out: whether the row was left out of training; these get a vermilion frame.
        title: above the grid.
        subtitle: a line or two beneath the title.
        columns: pictures in a row.
        tile: side of a picture in pixels.

    Returns:
        An SVG document.

    Raises:
        ValueError: there are no pictures, they differ from the captions in number, or hold other values.
    """
    left_out = [False] * len(captions) if out is None else list(out)
    if not len(images) or not len(images) == len(captions) == len(left_out):
        raise ValueError(
            f"grid {title!r} needs a caption for each picture, got {len(images)} pictures, {len(captions)} captions, "
            f"{len(left_out)} marks"
        )
    parted = [caption.split("\n") for caption in captions]
    gap, margin, tallest = 18, 32, max(map(len, parted))
    width = margin * 2 + columns * (tile + gap) - gap
    head, top = svg.heading(title, subtitle, width)
    top += 14
    body, step = [head], tile + 12 + 15 * tallest + gap
    for index, (image, words, gone) in enumerate(zip(images, parted, left_out, strict=True)):
        x, y = margin + index % columns * (tile + gap), top + index // columns * step
        frame = svg.WRONG if gone else svg.RULE
        body.append(
            svg.element(
                "rect",
                x=x - 2,
                y=y - 2,
                width=tile + 4,
                height=tile + 4,
                rx=3,
                fill="none",
                stroke=frame,
                stroke_width=1.5,
            )
        )
        uri = svg.data_uri(Tile(image).pixels())
        says = svg.tooltip(", ".join(words))
        body.append(
            svg.element("image", says, href=uri, x=x, y=y, width=tile, height=tile, image_rendering="pixelated")
        )
        for line, text in enumerate(words):
            fill = svg.MUTED if line else frame if gone else svg.INK
            body.append(
                svg.text(svg.shorten(text, tile + gap - 4, 11), x, y + tile + 17 + 15 * line, size=11, fill=fill)
            )
    rows = -(-len(images) // columns)
    return svg.drawing(width, top + rows * step + 4, title, "".join(body))


def filter_page(decisions: Decisions, report: Mapping[str, Any], pictures: np.ndarray | None = None) -> str:
    """One HTML page, without scripts or anything outside it, on what filters made of a training set.

    All counts are computed from the decisions.

    Args:
        decisions: about every row; the calibration of its columns is shown.
        report: ``simulation`` says whether the data were poisoned on purpose, ``pictures.rows`` which rows the pictures
            show, ``notes`` (a list of text) is shown beneath the outcome; the rest is not used.
        pictures: uint8 ``(M, C, H, W)``; None: there are none.

    Returns:
        An HTML document.

    Raises:
        ValueError: pictures and ``pictures.rows`` do not fit together.
    """
    classes = int(decisions.labels.max()) + 1
    counts = summary(decisions, classes)
    notes = report.get("notes", [])
    affected = sorted(counts["classes"], key=lambda c: c[KEEP] / max(c["rows"], 1))
    affected = [c for c in affected if c["rows"]]
    histograms = [
        Markup(score_histogram(column, canaries=_canaries(column.calibration)))  # noqa: S704 (made of escaped text)
        for column in decisions.columns
    ]
    grid = None if pictures is None else Markup(_grid(decisions, report, pictures))  # noqa: S704
    return _ENVIRONMENT.from_string(_PAGE).render(
        outcome=_outcome(counts),
        notes=_simulation(report) + ([n for n in notes if isinstance(n, str)] if isinstance(notes, list) else []),
        counts=counts,
        filters=[
            {"name": c.name, "share": c.flagged.mean(), **counts["filters"][c.name], **_calibration(c.calibration)}
            for c in decisions.columns
        ],
        classes=sorted(affected[:CLASSES], key=lambda c: c["label"]),
        left_out_classes=max(0, len(affected) - CLASSES),
        histograms=histograms,
        grid=grid,
        ink=svg.INK,
        muted=svg.MUTED,
        rule=svg.RULE,
        wrong=svg.WRONG,
        font=Markup(svg.FONT),  # noqa: S704
    )


def page_from_folder(folder: str | Path) -> str:
    """The page of a run, from the files in its folder: the decisions, the report, and pictures if there are any.

    Raises:
        ValueError: a file is missing, is not what it should be, or does not fit the others; one line that names it.
    """
    folder = Path(folder)
    decisions, report = read_decisions(folder / DECISIONS_FILE), read_report(folder / REPORT_FILE)
    known = report.get("filters")
    columns = []
    for column in decisions.columns:
        own = known.get(column.name) if isinstance(known, dict) else None
        calibration = own.get("calibration") if isinstance(own, dict) else None
        columns.append(replace(column, calibration=calibration if isinstance(calibration, dict) else {}))
    path = folder / PICTURES_FILE
    pictures = _read_pictures(path) if path.exists() else None
    try:
        return filter_page(replace(decisions, columns=tuple(columns)), report, pictures)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


# --- what the page shows --------------------------------------------------------------------------------------------


def _simulation(report: Mapping[str, Any]) -> list[str]:
    """What is known of data that were poisoned on purpose, in a sentence or two; nothing for others."""
    known = report.get("simulation")
    if not isinstance(known, dict):
        return []
    rates = {"tpr": "of the poisoned rows are left out", "fpr": "of the others"}
    said = [
        f"{100 * value:.2f} % {text}" for key, text in rates.items() if (value := _number(known.get(key))) is not None
    ]
    return [" ".join([str(known.get("note", "")), f"{', '.join(said)}." if said else ""]).strip()]


def _outcome(counts: Mapping[str, Any]) -> str:
    rows, made = counts["rows"], counts["decisions"]
    changed = [f"{made[name]:,} {words}" for name, words in OUT.items() if made[name]]
    if not changed:
        return f"All {rows:,} training rows are used; no filter led to a change."
    used = f"{counts['kept']:,} of {rows:,} training rows are used"
    return f"{used} ({100 * counts['kept'] / rows:.1f} %): {', '.join(changed)}."


def _calibration(calibration: Mapping[str, Any]) -> dict[str, str]:
    """What the table shows of how a threshold was found."""
    shares = {name: _number(calibration.get(name)) for name in ("expected_fpr", "power")}
    texts = {name: str(calibration.get(name) or "") for name in ("method", "note")}
    groups = calibration.get("groups")
    if isinstance(groups, list) and groups:
        flagged = sum(isinstance(group, dict) and group.get("flagged") is True for group in groups)
        texts["note"] = f"{flagged} of {len(groups)} groups flagged. {texts['note']}".strip()
    return {**texts, **{name: "" if v is None else f"{100 * v:.3g} %" for name, v in shares.items()}}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def _canaries(calibration: Mapping[str, Any]) -> list[float]:
    scores = calibration.get("canary_scores")
    return [v for v in map(_number, scores) if v is not None] if isinstance(scores, list) else []


def _grid(decisions: Decisions, report: Mapping[str, Any], pictures: np.ndarray) -> str:
    about = report.get("pictures")
    rows = about.get("rows") if isinstance(about, dict) else None
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < len(decisions) for row in rows):
        raise ValueError("pictures.rows of the report must be numbers of rows of the decisions")
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or 0 in pictures.shape or len(pictures) != len(rows):
        raise ValueError(
            f"pictures must be uint8 (M, C, H, W) with one for each of {len(rows)} pictures.rows, got "
            f"{pictures.dtype} {pictures.shape}"
        )
    images = np.asarray(pictures[:PICTURES], dtype=float) / 255
    if images.shape[1] not in (1, 3):  # what no screen can show, such as five bands of a satellite
        images = images.mean(axis=1, keepdims=True)
    captions = [_caption(decisions, row) for row in rows[:PICTURES]]
    return suspicious_grid(
        images,
        captions,
        out=[not decisions.kept[row] for row in rows[:PICTURES]],
        subtitle="Beneath each its class, its number, the score of the filter that finds it strangest, and the "
        "decision. A coloured frame: not used for training.",
    )


def _caption(decisions: Decisions, row: int) -> str:
    """Shown is the score of the filter to which it is the rarest: scores of two filters have no common scale."""
    words = [f"class {decisions.labels[row]}", f"row {row}"]
    columns = [column for column in decisions.columns if column.flagged[row]] or decisions.columns
    if columns:
        column = min(columns, key=lambda c: int((c.scores >= c.scores[row]).sum()))
        words.append(f"{column.scores[row]:.3g} {column.name}")
    return "\n".join([*words, str(decisions.decision[row])])


def _read_pictures(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"the file is larger than {LARGEST} bytes")
        return np.load(path, mmap_mode="r", allow_pickle=False)  # a map: a false header cannot ask for memory
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _plain(value: Any) -> Any:
    """Text that a page can hold; jinja2 escapes it afterwards."""
    return svg.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_plain)

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Data filtering</title>
<style>
  body { margin: 0; background: #f5f6f8; color: {{ ink }}; font: 14px/1.5 {{ font }}; }
  main { max-width: 880px; margin: 0 auto; padding: 24px 16px 48px; }
  h1 { font-size: 24px; margin: 8px 0 4px; }
  h2 { font-size: 16px; margin: 0 0 8px; }
  p { margin: 4px 0; }
  .outcome { font-size: 16px; }
  .muted { color: {{ muted }}; }
  section { background: #fff; border-radius: 10px; margin: 16px 0 0; padding: 20px 32px; overflow-x: auto; }
  svg { display: block; max-width: 100%; height: auto; margin: 16px 0 0; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid {{ rule }}; vertical-align: top; }
  th { font-weight: 600; color: {{ muted }}; font-size: 12px; }
  .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .bar { width: 120px; height: 8px; display: inline-block; background: {{ rule }}; margin-right: 8px; }
  .bar i { background: {{ wrong }}; height: 8px; display: block; }
  code { font-size: 12px; }
  summary { cursor: pointer; padding: 4px 0; }
</style>
</head>
<body>
<main>
<h1>Data filtering</h1>
<p class="outcome">{{ outcome }}</p>
{% for note in notes %}
<p class="muted">{{ note }}</p>
{% endfor %}
<section>
<h2>Filters</h2>
<table>
<tr><th>filter<th class="n">flagged<th class="n">share<th class="n">threshold<th>calibrated by
<th class="n">expected false alarms<th class="n">canaries found</tr>
{% for f in filters %}
<tr><td>{{ f.name }}<td class="n">{{ "{:,}".format(f.flagged) }}<td class="n">{{ "%.2f" | format(100 * f.share) }} %
<td class="n">{{ "none" if f.threshold is none else "%.4g" | format(f.threshold) }}
<td>{{ f.method or "not calibrated" }}{% if f.note %}<br><span class="muted">{{ f.note }}</span>{% endif %}

<td class="n">{{ f.expected_fpr or "unknown" }}<td class="n">{{ f.power or "unknown" }}</tr>
{% endfor %}
</table>
<p class="muted">Expected false alarms: the share of clean rows that the filter flags. Canaries are rows that were made
suspicious on purpose; real poison may be harder to find. A row that is flagged need not be poisoned, and a row that is
not flagged need not be clean.</p>
{% if counts.expected_fpr is not none %}
<p class="muted">Of clean rows, at most about {{ "%.3g" | format(100 * counts.expected_fpr) }} % are expected to be left
out by the thresholds together; groups that are judged by a reference have no such rate.</p>
{% endif %}
</section>
{% if grid %}
{{ grid }}
{% endif %}
{% for histogram in histograms %}
{{ histogram }}
{% endfor %}
<section>
<h2>Classes</h2>
<table>
<tr><th class="n">class<th class="n">rows<th class="n">unchanged<th class="n">drawn less often<th class="n">quarantined
<th class="n">dropped<th>share affected</tr>
{% for c in classes %}
<tr><td class="n">{{ c.label }}
{% for n in (c.rows, c.keep, c.downweight, c.quarantine, c.drop) %}
<td class="n">{{ "{:,}".format(n) }}
{% endfor %}
{% set gone = 100 * (1 - c.keep / c.rows) %}
<td><span class="bar"><i style="width: {{ "%.2f" | format(gone) }}%"></i></span>{{ "%.1f" | format(gone) }} %</tr>
{% endfor %}
</table>
{% if left_out_classes %}
<p class="muted">The classes with the largest share; {{ left_out_classes }} more are in filter_report.json.</p>
{% endif %}
</section>
<section>
<h2>The rows with the highest scores</h2>
{% for f in filters %}
<details><summary>{{ f.name }}</summary>
<table>
<tr><th class="n">row<th class="n">class<th class="n">score<th>decision<th>sha256</tr>
{% for row in f.suspicious %}
<tr><td class="n">{{ row.index }}<td class="n">{{ row.label }}<td class="n">{{ "%.6g" | format(row.score) }}
<td>{{ row.decision }}<td><code>{{ row.sha256[:16] + "…" if row.sha256 else "" }}</code></tr>
{% endfor %}
</table>
</details>
{% endfor %}
</section>
</main>
</body>
</html>
"""
