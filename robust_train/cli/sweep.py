"""``robust-train sweep-table DIR``: the jobs of a sweep in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from robust_train.config import ConfigError
from robust_train.report.sweep import read_sweep
from robust_train.report.sweep_page import as_csv, as_markdown, as_page

TABLE = "sweep"  # with .md, .csv and .html


def sweep_table(argv: list[str]) -> None:
    """The command: prints the table, and leaves it in the sweep's folder as Markdown, CSV and an HTML page."""
    parser = argparse.ArgumentParser(
        "robust-train sweep-table",
        description="Mean and spread over seeds, and the Pareto front of clean accuracy, robust accuracy and epsilon.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder, runs/sweep unless you chose one")
    folder: Path = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    found = read_sweep(folder)
    table = as_markdown(found)
    (folder / f"{TABLE}.md").write_text(table, encoding="utf-8")
    with (folder / f"{TABLE}.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(as_csv(found))
    (folder / f"{TABLE}.html").write_text(as_page(found, folder.resolve().name), encoding="utf-8")
    print(table)
    print(f"In {folder}: {TABLE}.md, {TABLE}.csv, {TABLE}.html.")
