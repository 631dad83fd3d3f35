"""Prints the tables of the runs; writes those of `uses` and `heads` into their page, or checks it.

python benchmarks/attribution report --check
"""

from __future__ import annotations

import argparse

from benchmarks import pages
from benchmarks.attribution import heads, uses
from benchmarks.attribution.tables import tables_of
from benchmarks.measure import show, table
from benchmarks.store import MEASURED, Store


def main() -> None:
    """Print or write the tables of all runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page differs")
    options = parser.parse_args()
    for name in ("attribution", "attribution_trainers"):
        store = Store(pages.RESULTS / f"{name}.jsonl")
        show(tables_of(store))
        print(f"\n{pages.machine_line(store.by_key[MEASURED])}")
    sections = {}
    for part, titles in ((uses, uses.OF_PAGE), (heads, heads.OF_PAGE)):
        tables = part.tables_of(Store(part.RUNS))
        show(tables)
        sections |= {name: f"{table(tables[title])}\n" for name, title in titles.items()}
    pages.write(pages.RESULTS / "attribution.md", sections, check=options.check)
