"""Finished runs, one line each, from which a killed comparison continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from hyperopt_peft.comparison.task import Run
from hyperopt_peft.utils.validation import differences, shortened

Result = dict[str, Any]
#: The key of a file's first line, the settings of all of its runs.
SETTINGS = "settings"
#: A set of rows in the settings, where each seed has its own.
OF_SEED = "of the seed"
#: The key of the rows of a seed, beside the settings.
ROWS = "rows"
#: In place of a setting that cannot be read: why, so that each call has a key of its own.
ANEW = "made anew"


class Store:
    """The results of runs, in the ``runs*.jsonl`` files of a folder.

    A run is found by what it depends on: its line has a ``key``, a hash of the settings of its
    method, which a line before it shows. Lines with other keys remain, and are not used. Several
    processes may write, each to a file of its own, and read all files. An unfinished line of a
    killed process is skipped.

    Args:
        folder: where the files are; None keeps all in memory.
        settings: by the name of a method, all settings on which its runs depend, as JSON.
        part: the name of this process's file.
        rows: by seed, the settings in which its runs differ from those of other seeds.

    Example:
        >>> from tempfile import mkdtemp
        >>> line = {**vars(Run("LoRA", "method", 0, 1e-3)), "metrics": {"eval_accuracy": 0.8}}
        >>> Store(folder := Path(mkdtemp()), {"LoRA": {"rows": 300}}).add(line)
        >>> [len(Store(folder, {"LoRA": {"rows": rows}}).results) for rows in (300, 400)]
        [1, 0]
        >>> Store(folder, {"LoRA": {"rows": 400}}).remark()
        '1 stored runs were made with other settings (rows: 300 → 400) and are not used'
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Mapping[str, Any]],
        part: str = "",
        rows: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self.settings = json.loads(json.dumps(settings))
        self.rows = rows or {}
        self.keys: dict[tuple[str, int], str] = {}
        self.folder = folder
        self.results: dict[Run, Result] = {}
        self.path = None if folder is None else folder / f"runs{part}.jsonl"
        self.reload()

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The store in ``folder`` with the settings of each method's last line."""
        every = [entry for path in _files(folder) for entry in read_entries(path)]
        known = {entry["key"]: entry for entry in every if SETTINGS in entry}
        runs = [entry for entry in every if SETTINGS not in entry]
        rows = {run["seed"]: known[run["key"]].get(ROWS, {}) for run in runs}
        return cls(folder, {x["method"]: known[x["key"]][SETTINGS] for x in runs}, rows=rows)

    def key(self, method: str, seed: int) -> str:
        """The hash of the settings of ``method``, and of the rows of ``seed``."""
        if (method, seed) not in self.keys:
            settings = {**self.settings.get(method, {}), **self.rows.get(seed, {})}
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            self.keys[method, seed] = digest.hexdigest()[:16]
        return self.keys[method, seed]

    @property
    def shared(self) -> Mapping[str, Any]:
        """The settings of the first method, which are those of the others but for the method."""
        return next(iter(self.settings.values()), {})

    def reload(self) -> None:
        """Read all that any process has written."""
        self.known: dict[Any, Any] = {}
        self.unused: list[Result] = []
        for entry in (each for path in _files(self.folder) for each in read_entries(path)):
            if SETTINGS in entry:
                self.known[entry["key"]] = {**entry[SETTINGS], **entry.get(ROWS, {})}
                continue
            names = [x for x in self.settings if self.key(x, entry["seed"]) == entry.get("key")]
            for name in names:  # equal methods have one key
                self.results[_run_of(entry, name)] = {**entry, "method": name}
            if not names and entry["method"] in self.settings:
                self.unused.append(entry)

    def add(self, result: Result) -> None:
        """Append the line of ``result`` in one write."""
        name, seed = result["method"], result["seed"]
        key = self.key(name, seed)
        result = {"key": key, **result}
        self.results[_run_of(result, name)] = result
        if self.path is not None:
            settings, rows = self.settings.get(name, {}), self.rows.get(seed, {})
            line = {"key": key, SETTINGS: settings, **({ROWS: rows} if rows else {})}
            head = [] if key in self.known else [line]
            self.known[key] = {**settings, **rows}
            append_entries(self.path, *head, result)

    @property
    def anew(self) -> str:
        """What makes the runs of which methods anew in each call, or nothing."""
        methods: dict[str, list[str]] = {}
        for name, settings in self.settings.items():
            for each in settings.values():
                if isinstance(each, dict) and ANEW in each:
                    methods.setdefault(each[ANEW], []).append(name)
        return "; ".join(
            f"{why}, so the runs of {', '.join(names)} are made anew each time"
            for why, names in methods.items()
        )

    def remark(self) -> str:
        """Which runs are made anew; or how many are not used, and the settings of the last."""
        if self.anew or not self.unused:
            return self.anew
        last = self.unused[-1]
        saved, now = self.known.get(last.get("key"), {}), self.settings[last["method"]]
        now = {**now, **self.rows.get(last["seed"], {})}
        (name, before, after), *others = differences(saved, now)
        more = f"; {len(others)} more differ" if others else ""
        return (
            f"{len(self.unused)} stored runs were made with other settings ({name}: "
            f"{shortened(before)} → {shortened(after)}{more}) and are not used"
        )

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
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in entries]
        if file.read(1) not in (b"", b"\n"):  # a line that a kill cut
            lines.insert(0, "\n")
        file.write("".join(lines).encode())


def _files(folder: Path | None) -> list[Path]:
    return sorted(folder.glob("runs*.jsonl")) if folder else []


def _run_of(entry: Mapping[str, Any], method: str) -> Run:
    values = {each.name: entry[each.name] for each in fields(Run)}
    return Run(**{**values, "method": method, "points": tuple(values["points"])})
