"""A sweep's table as Markdown, CSV and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Context

from .sweep import (
    NAMES,
    RATES,
    WORST,
    Row,
    Sweep,
    alike,
    by_folder,
    comparable,
    family,
    merits,
    metric_order,
    shared_overrides,
    swept_keys,
    table,
)
from .tables import Column, csv_table, markdown_table, plain, tradeoff_page
from .tradeoff import Point, scatter


def notes(sweep: Sweep) -> list[str]:
    """What a reader of the table has to know: how it was measured, what cannot be compared, and what was left out."""
    rows, kept = table(sweep), {id(job) for jobs in alike(sweep) for job in jobs}
    threats, judges = sorted({row.threat for row in rows}), sorted({row.judges for row in rows})
    out = []
    if len(threats) > 1:
        out.append("The threat differs: rows compete for the front only with those of the same threat.")
    elif threats:
        out.append(f"Threat: {threats[0]}.")
    if len(judges) > 1:
        out.append(
            f"Rows were judged by different attacks: {'; or '.join(judges)}. Weaker attacks make a model look more "
            "robust: rows are comparable, and compete for the front, only where the attacks are the same."
        )
    elif judges:
        out.append(f"Judged by {judges[0]}.")
    if rows:
        out += [
            "★ is on the Pareto front: no other row is at least as good in clean performance, robust performance and "
            "ε, and better in one of them. Means are compared; a difference smaller than the spread may be chance.",
            "± is the sample standard deviation over seeds; – stands where a single seed says nothing of it.",
        ]
    if deltas := sorted({job.metrics["delta"] or 0.0 for job in sweep.jobs if "delta" in job.metrics}):
        held = f"δ = {deltas[0]:g}" if len(deltas) == 1 else "different δ, and is comparable only where δ is the same"
        out.append(f"ε holds with {held}. Of several seeds the largest is told, rounded up.")
    if any(row.void for row in rows):
        out.append("Where ε is void, the certificate of a seed was voided; such a row is not on the front.")
    if lacking := sum(not merits(row) for row in rows):
        out.append(f"Not compared: {lacking} of {len(rows)} rows, which lack a clean or a robust measurement.")
    doubles = [job.folder for job in sorted(sweep.jobs, key=by_folder) if id(job) not in kept]
    out += [f"{folder} is left out: a later folder has the same settings and seed." for folder in doubles]
    return out + [f"{job.folder} cannot be read and is left out: {job.reason}." for job in sweep.unreadable]


def _heading(name: str) -> str:
    kind = family(name)
    return f"{NAMES[kind]} {name.removeprefix(kind)}".rstrip()


def _shown(name: str, row: Row) -> str:
    if (measured := row.metrics.get(name)) is None:
        return "not private" if name in WORST else "not measured"
    value, spread = measured.value, measured.spread
    some = "" if measured.n == row.seeds else f" ({measured.n} of {row.seeds} seeds)"
    if name == "epsilon" or value is None:
        return f"{_rounded_up(value)}{some}"
    if name == "delta":
        return f"{value:g}{some}"
    if RATES.fullmatch(name):
        told, wide = f"{100 * value:.1f} %", None if spread is None else 100 * spread
    else:
        told, wide = f"{value:.1f} s" if name == "train_seconds" else f"{value:,.6g}", spread
    return f"{told} ± {'–' if wide is None else f'{wide:.2g}'}{some}"


def _rounded_up(epsilon: float | None) -> str:
    """What is shown must not be less than what was proved."""
    if epsilon is None:
        return "void"
    return str(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(epsilon)))


def _metrics(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row.metrics}, key=metric_order)


def _columns(sweep: Sweep, rows: Sequence[Row]) -> list[Column]:
    def column(heading: str, told: Callable[[Row], str], number: bool = False) -> Column:
        return Column(heading, [told(row) for row in rows], number)

    out = [column("front", lambda row: "★" if row.front else "")]
    out += [column(key, lambda row, key=key: row.settings.get(key, "not set")) for key in swept_keys(sweep)]
    if len({row.threat for row in rows}) > 1:
        out.append(column("threat", lambda row: row.threat))
    if len({row.judges for row in rows}) > 1:
        out.append(column("judged by", lambda row: row.judges))
    out.append(column("seeds", lambda row: str(row.seeds), number=True))
    one_delta = len({row.metrics["delta"].value for row in rows if "delta" in row.metrics}) == 1
    shown = [name for name in _metrics(rows) if not (name == "delta" and one_delta)]
    return out + [column(_heading(name), lambda row, name=name: _shown(name, row), number=True) for name in shown]


def _outcome(sweep: Sweep, rows: Sequence[Row]) -> str:
    counts = {"finished": sweep.jobs, "unfinished": sweep.unfinished, "unreadable": sweep.unreadable}
    told = ", ".join(f"{len(jobs)} {name}" for name, jobs in counts.items() if jobs or name == "finished")
    return f"Jobs: {told}. Settings: {len(rows)}, of which {sum(row.front for row in rows)} on the Pareto front."


def _failures(sweep: Sweep) -> list[tuple[str, str, str]]:
    """Folder, own settings and reason of every job that did not finish."""
    shared = set(shared_overrides(sweep))
    return [
        (job.folder, ", ".join(o for o in job.overrides if o not in shared), job.reason) for job in sweep.unfinished
    ]


# --- documents ------------------------------------------------------------------------------------------------------


def as_markdown(sweep: Sweep) -> str:
    """The table in GitHub's Markdown, aligned for a terminal too, with its notes and the jobs that did not finish."""
    rows = table(sweep)
    shared, failures = shared_overrides(sweep), _failures(sweep)
    parts = [_outcome(sweep, rows)]
    parts += [plain(f"All jobs: {' '.join(shared)}")] if shared else []
    parts += [markdown_table(_columns(sweep, rows))] if rows else []
    parts += ["\n".join(f"- {plain(note)}" for note in notes(sweep))]
    parts += (
        ["Did not finish:", "\n".join(f"- {plain(': '.join(filter(None, f)))}" for f in failures)] if failures else []
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def as_csv(sweep: Sweep) -> str:
    """All rows with unrounded numbers, as RFC 4180 wants it; a metric comes with its spread and its number of seeds.

    An empty cell: not measured, not private, or no spread. Text that a spreadsheet would run as a formula gets an
    apostrophe in front.
    """
    rows, swept = table(sweep), swept_keys(sweep)
    names = _metrics(rows)
    parts = [f"{name}{part}" for name in names for part in ("", "_spread", "_seeds")]
    lines = [["pareto_front", *swept, "seeds", *parts, "judged_threat", "judged_attacks"]]
    for row in rows:
        cells = ["yes" if row.front else "no", *(row.settings.get(key, "") for key in swept), str(row.seeds)]
        for measured in map(row.metrics.get, names):
            numbers = (measured.value, measured.spread, measured.n) if measured else (None, None, 0)
            cells += ["" if number is None else repr(number) for number in numbers]
            if measured and measured.value is None:
                cells[-3] = "void"
        lines.append([*cells, row.threat, row.judges])
    return csv_table(lines)


def as_page(sweep: Sweep, title: str) -> str:
    """One HTML page, without scripts or anything outside it: plots, the table, its notes, jobs that did not finish.

    Args:
        sweep: its jobs.
        title: heading of the page.

    Returns:
        An HTML document.
    """
    rows = table(sweep)
    return tradeoff_page(
        title=title,
        outcome=_outcome(sweep, rows),
        shared=shared_overrides(sweep),
        plots=[_plot([rows[i] for i in group]) for group in comparable(rows)],
        columns=_columns(sweep, rows),
        front=[row.front for row in rows],
        notes=notes(sweep),
        failures=_failures(sweep),
    )


def _plot(rows: Sequence[Row]) -> str:
    """Of rows that were measured alike."""
    rates = rows[0].kind == "acc"
    what = "accuracy" if rates else "loss"
    return scatter(
        [_point(row) for row in rows],
        title=f"Clean and robust {what}",
        subtitle=f"{rows[0].threat}; {rows[0].judges}",
        x_label=f"clean {what}, {'more' if rates else 'less'} is better",
        y_label=f"robust {what}, worst case over the attacks",
        percent=rates,
        lower_is_better=not rates,
    )


def _point(row: Row) -> Point:
    clean, robust = row.metrics[f"clean_{row.kind}"], row.metrics[f"robust_{row.kind}"]
    settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
    told = ", ".join(f"{_heading(name)} {_shown(name, row)}" for name in row.metrics)
    epsilon = _shown("epsilon", row) if "epsilon" in row.metrics else ""
    return Point(
        name=": ".join(text for text in (settings, told) if text),
        label=short_label(row.settings),
        x=clean.value or 0.0,
        y=robust.value or 0.0,
        x_spread=clean.spread,
        y_spread=robust.spread,
        mark=f"ε {epsilon}" if row.void else f"ε = {epsilon}" if epsilon else "",
        front=row.front,
    )


def short_label(settings: Mapping[str, str]) -> str:
    """``{"recipe": "trades", "objective.beta": "6"}`` as ``trades, beta 6``."""
    ends = [key.rpartition(".")[2] for key in settings]
    words = []
    for (key, value), end in zip(settings.items(), ends, strict=True):
        speaks = "." not in key and value[:1].isalpha() and value not in ("true", "false", "null")
        words.append(value if speaks else f"{end if ends.count(end) == 1 else key} {value}")
    return ", ".join(words)
