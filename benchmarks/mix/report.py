"""Write the tables of docs/when-bilevel-pays.md from the runs, or check them.

python benchmarks/mix report --check
"""

from __future__ import annotations

import argparse

from benchmarks import pages
from benchmarks.mix import defaults, language_tables, tables
from benchmarks.store import MEASURED, Store


def main() -> None:
    """The tables of the files of runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where they differ")
    options = parser.parse_args()
    sections = {}
    for name, file, tables_of in (
        ("mix", "mix", tables.tables_of),
        ("mix defaults", "mix_defaults", defaults.tables_of),
        ("mix of texts", "mix_language", language_tables.tables_of),
    ):
        store = Store(pages.RESULTS / f"{file}.jsonl")
        if MEASURED in store.by_key:
            sections[name] = pages.titled(tables_of(store), store.by_key[MEASURED])
    pages.write(pages.DOCS / "when-bilevel-pays.md", sections, check=options.check)
