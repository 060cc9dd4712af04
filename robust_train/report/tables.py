"""Tables as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment
from markupsafe import Markup

from . import _svg as svg

PLAIN = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")  # a number; no spreadsheet takes it for a formula


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, a text for each row, and whether these are numbers, to stand on the right."""

    heading: str
    cells: Sequence[str]
    number: bool = False


def plain(text: str) -> str:
    """The text on one line of Markdown that shows just this: no markup, no HTML, no new cell."""
    return re.sub(r"([\\`*\[<|])", r"\\\1", svg.clean(text).replace("&", "&amp;"))


def markdown_table(columns: Sequence[Column]) -> str:
    """A table in GitHub's Markdown, aligned so that it can be read as it is."""
    padded = []
    for column in columns:
        cells = [plain(text) for text in (column.heading, *column.cells)]
        width = max(3, *map(len, cells))
        cells = [text.rjust(width) if column.number else text.ljust(width) for text in cells]
        rule = "-" * (width - 1) + (":" if column.number else "-")
        padded.append([cells[0], rule, *cells[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*padded, strict=True))


def csv_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells as CSV after RFC 4180; a text that spreadsheets would run gets an apostrophe in front."""
    out = io.StringIO()
    csv.writer(out).writerows([_defused(svg.clean(text)) for text in row] for row in rows)
    return out.getvalue()


def _defused(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not PLAIN.fullmatch(text) else text


def tradeoff_page(
    *,
    title: str,
    outcome: str,
    shared: Sequence[str],
    plots: Sequence[str],
    columns: Sequence[Column],
    front: Sequence[bool],
    notes: Sequence[str],
    failures: Sequence[tuple[str, str, str]],
) -> str:
    """One HTML page, without scripts or anything outside it.

    Args:
        title: heading of the page.
        outcome: a sentence beneath it.
        shared: settings of all rows.
        plots: what :func:`scatter` returned.
        columns: of the table.
        front: for each of its rows, whether it stands out.
        notes: sentences beneath the table.
        failures: folder, settings and reason of every job that did not finish.

    Returns:
        An HTML document.

    Raises:
        ValueError: a plot is not a drawing made here.
    """
    for plot in plots:
        svg.size_of(plot)
    return _ENVIRONMENT.from_string(_PAGE).render(
        title=title,
        outcome=outcome,
        shared=shared,
        plots=[Markup(plot) for plot in plots],  # noqa: S704 (made of escaped text)
        columns=columns,
        rows=list(zip(front, *(column.cells for column in columns), strict=True)),
        notes=notes,
        failures=failures,
        font=Markup(svg.FONT),  # noqa: S704
    )


def _plain(value: object) -> object:
    return svg.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_plain)

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
  :root { --ink: #1f2328; --muted: #5c6570; --rule: #e3e6ea; --card: #fff; --page: #f5f6f8; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6e9ed; --muted: #a3abb5; --rule: #3a4047; --card: #1f2328; --page: #14171a; }
  }
  body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.5 {{ font }}; overflow-wrap: anywhere; }
  main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 48px; }
  h1 { font-size: 24px; margin: 8px 0 4px; }
  h2 { font-size: 16px; margin: 0 0 8px; }
  p { margin: 4px 0; }
  ul { margin: 0; padding-left: 20px; }
  section { background: var(--card); border-radius: 10px; margin: 16px 0 0; padding: 20px; }
  .wide { overflow-x: auto; overflow-wrap: normal; }
  .plot { padding: 0; }
  svg { display: block; width: 100%; min-width: 600px; max-width: 960px; height: auto; margin: 0 auto; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
  th { font-weight: 600; color: var(--muted); font-size: 12px; }
  .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .front td { font-weight: 700; }
  .muted { color: var(--muted); }
  code { font-size: 12px; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p>{{ outcome }}</p>
{% if shared %}
<p class="muted">All jobs: {% for text in shared %}<code>{{ text }}</code> {% endfor %}</p>
{% endif %}
{% for plot in plots %}
<section class="wide plot" tabindex="0">{{ plot }}</section>
{% endfor %}
{% if rows %}
<section class="wide" tabindex="0">
<table>
<tr>{% for c in columns %}<th scope="col"{% if c.number %} class="n"{% endif %}>{{ c.heading }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr{% if row[0] %} class="front"{% endif %}>
{%- for c in columns %}<td{% if c.number %} class="n"{% endif %}>{{ row[loop.index] }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</section>
{% endif %}
{% if notes %}
<section><h2>Notes</h2>
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
</section>
{% endif %}
{% if failures %}
<section><h2>Did not finish</h2>
<ul>{% for folder, settings, reason in failures %}<li><code>{{ folder }}</code>
{% if settings %}<code>{{ settings }}</code>{% endif %} {{ reason }}</li>{% endfor %}</ul>
</section>
{% endif %}
</main>
</body>
</html>
"""
