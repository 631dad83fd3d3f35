"""Print the tables of the runs, from which docs/attribution.md has its figures.

python benchmarks/attribution report
"""

from __future__ import annotations

from benchmarks.attribution.tables import tables_of, targets_of
from benchmarks.measure import show
from benchmarks.pages import RESULTS, machine_line
from benchmarks.store import MEASURED, Store


def main() -> None:
    """The tables of both files of runs."""
    for name in ("attribution", "attribution_trainers"):
        store = Store(RESULTS / f"{name}.jsonl")
        tables = tables_of(store)
        show(tables, targets_of(tables))
        print(f"\n{machine_line(store.by_key[MEASURED])}")
