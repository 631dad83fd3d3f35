"""Print the tables of the runs, and write those of `uses` into their pages, or check them.

python benchmarks/attribution report --check
"""

from __future__ import annotations

import argparse

from benchmarks import pages
from benchmarks.attribution import uses
from benchmarks.attribution.tables import tables_of, targets_of
from benchmarks.measure import show, table
from benchmarks.store import MEASURED, Store


def main() -> None:
    """The tables of the three files of runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page differs")
    options = parser.parse_args()
    for name in ("attribution", "attribution_trainers"):
        store = Store(pages.RESULTS / f"{name}.jsonl")
        tables = tables_of(store)
        show(tables, targets_of(tables))
        print(f"\n{pages.machine_line(store.by_key[MEASURED])}")
    tables = uses.tables_of(Store(pages.RESULTS / "attribution_uses.jsonl"))
    show(tables)
    for page, titles in uses.OF_PAGES.items():
        sections = {name: f"{table(tables[title])}\n" for name, title in titles.items()}
        pages.write(page, sections, check=options.check)
