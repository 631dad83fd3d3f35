"""Results in a file, one line each, so that an interrupted benchmark can continue."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, keep_memory
from hyperopt_peft.comparison.store import append_entries, read_entries

Row = dict[str, Any]
#: The key of the entry with versions and machine.
MEASURED = "measured"


class Store:
    """The entries of a ``.jsonl`` file by their ``key``; a later line replaces an earlier one.

    Read and written as the runs of `hyperopt_peft.comparison.store`.

    Args:
        path: the file, which need not exist; None stores entries in memory only.

    Example:
        >>> store = Store(None)
        >>> row = store.entry(part="cost", task="tweets")
        >>> row["seconds"] = 2.0
        >>> store.save(row)
        >>> store.entry(part="cost", task="tweets")["seconds"], len(store.of("methods"))
        (2.0, 0)
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.by_key: dict[str, Row] = {}
        self.reload()

    def reload(self) -> None:
        """Read the lines that other processes have appended."""
        if self.path is not None:
            self.by_key |= {row["key"]: row for row in read_entries(self.path)}

    @property
    def rows(self) -> list[Row]:
        """All entries, in the order of their first lines."""
        return list(self.by_key.values())

    def of(self, part: str) -> list[Row]:
        """The entries of a part."""
        return [row for row in self.rows if row.get("part") == part]

    def get(self, key: str) -> Row | None:
        """The entry with this key, None without one."""
        return self.by_key.get(key)

    def entry(self, **fields: Any) -> Row:
        """The entry with these fields; a new entry is written by `save`."""
        key = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        return self.by_key.setdefault(key, {"key": key, **fields})

    def save(self, row: Row) -> None:
        """Append an entry, the whole line at once."""
        self.by_key[row["key"]] = row
        if self.path is not None:
            append_entries(self.path, row)

    def finish(self, device: str = "cpu") -> None:
        """Add an entry with versions and machine, and rewrite the file with one line per entry.

        No other process may append at the same time.
        """
        self.save({"key": MEASURED, **environment(device)})
        if self.path is None:
            return
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
        part = self.path.with_suffix(".part")
        part.write_text("".join(lines))
        part.replace(self.path)


def run_parser(
    description: str, results: Path, parts: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser of ``--results FILE``, ``--quick`` and ``--parts``, for benchmarks with a store."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--results", type=Path, default=results, help="file of all runs (.jsonl), to be continued"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few short runs, which are printed and not stored"
    )
    if parts := list(parts):
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    return parser


def opened(options: argparse.Namespace) -> Store:
    """Open the store that the options name; use one thread and no progress bars."""
    from text_data import quiet

    torch.set_num_threads(1)
    keep_memory()
    quiet()
    return Store(None if options.quick else options.results)
