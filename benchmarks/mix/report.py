"""Write the tables of docs/when-bilevel-pays.md from the runs, or check them.

python benchmarks/mix report --check
"""

from __future__ import annotations

import argparse

from benchmarks import pages
from benchmarks.mix.tables import tables_of
from benchmarks.store import MEASURED, Store


def main() -> None:
    """The tables of the file of runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where they differ")
    options = parser.parse_args()
    store = Store(pages.RESULTS / "mix.jsonl")
    text = pages.titled(tables_of(store), store.by_key[MEASURED])
    pages.write(pages.DOCS / "when-bilevel-pays.md", {"mix": text}, check=options.check)
