"""Results that are appended to a file, one line for each, so that a benchmark can go on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, keep_memory

Row = dict[str, Any]
#: The key of the entry that has versions and machine.
MEASURED = "measured"


class Store:
    """The entries of a ``.jsonl`` file by their ``key``; of two lines of one key the last one wins.

    A line that a killed process left unfinished is skipped. Several processes may append to one
    file.

    Args:
        path: the file, which need not exist; None keeps all in memory.

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
        """Read what other processes have appended."""
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # of a process that was killed
                continue
            self.by_key[row["key"]] = row

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
        """The entry that these fields name; a new one is in the file once it is saved."""
        key = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        return self.by_key.setdefault(key, {"key": key, **fields})

    def save(self, row: Row) -> None:
        """Append an entry, the whole line at once."""
        self.by_key[row["key"]] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            begun = file.tell() and self._last_byte(file) != b"\n"
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(b"\n" + line if begun else line)

    @staticmethod
    def _last_byte(file: Any) -> bytes:
        file.seek(-1, 2)
        return bytes(file.read(1))

    def finish(self, device: str = "cpu") -> None:
        """Add the entry ``measured``, versions and machine, and leave one line for each entry.

        No other process may be appending.
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
    """``--results FILE``, ``--quick`` and ``--parts``, for benchmarks that go on from a file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--results", type=Path, default=results, help="all runs (a .jsonl file); goes on from it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few short runs, which are printed and not kept"
    )
    if parts := list(parts):
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    return parser


def opened(options: argparse.Namespace) -> Store:
    """The store that the options name, with one thread and without progress bars."""
    from text_data import quiet

    torch.set_num_threads(1)
    keep_memory()
    quiet()
    return Store(None if options.quick else options.results)
