"""Finished runs, one line each, from which a killed comparison continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hyperopt_peft.comparison.task import Run
from hyperopt_peft.utils.validation import require_settings

Result = dict[str, Any]
#: The key of a file's first line, the settings of all of its runs.
SETTINGS = "settings"


class Store:
    """The results of runs, in the ``runs*.jsonl`` files of a folder.

    Several processes may write, each to a file of its own, and read all files. An unfinished line
    of a killed process is skipped.

    Args:
        folder: where the files are; None keeps all in memory.
        settings: the settings that all runs share; runs with others are refused.
        part: the name of this process's file.

    Raises:
        ProblemError: a file has runs of other settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], part: str = "") -> None:
        self.settings = json.loads(json.dumps(settings, default=_plain))
        self.folder, self.results = folder, dict[Run, Result]()
        self.path = None if folder is None else folder / f"runs{part}.jsonl"
        self.reload()

    def reload(self) -> None:
        """Read all that any process has written."""
        for path in sorted(self.folder.glob("runs*.jsonl")) if self.folder else ():
            for entry in read_entries(path):
                if SETTINGS in entry:
                    require_settings(str(path), entry[SETTINGS], "this comparison", self.settings)
                else:
                    self.results[_run_of(entry)] = entry

    def add(self, result: Result) -> None:
        """Append the line of ``result`` in one write."""
        self.results[_run_of(result)] = result
        if self.path is not None:
            head = [] if self.path.exists() else [{SETTINGS: self.settings}]
            append_entries(self.path, *head, result)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs without a result, each once."""
        return [run for run in dict.fromkeys(runs) if run not in self.results]


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a ``.jsonl`` file, none without one; a line that a kill cut is skipped."""
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def append_entries(path: Path, *entries: Mapping[str, Any]) -> None:
    """Append a line for each of ``entries`` to ``path``, in one write; others may append too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
        cut = file.read(1) not in (b"", b"\n")
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in entries)
        file.write(("\n" * cut + text).encode())


def _plain(value: Any) -> Any:
    """A set in an order that is the same in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _run_of(entry: Mapping[str, Any]) -> Run:
    values = {each.name: entry[each.name] for each in fields(Run)}
    return Run(**{**values, "marks": tuple(values["marks"])})
