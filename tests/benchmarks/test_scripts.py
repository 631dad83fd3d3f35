"""Every benchmark script runs with its smallest sizes; the store of results, and the pages."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks  # noqa: F401 - its entry in sys.path is there before a test takes a copy
from benchmarks import pages
from benchmarks.memory import peak_memory
from benchmarks.store import Store
from tests.support.process import ROOT, python

SLOW = [
    "speed timing --quick",
    "speed language --quick",
    "speed gpu --device cpu --small --threads 1 --parts layer head",
    "speed on_paper --quick",
    "speed head --quick",
    "estimators comparison --quick --methods direct cg:steps=10",
    "estimators convergence --quick",
    "estimators fidelity --quick",
    "estimators noise --quick",
    "attribution scores --quick --parts methods cost suspects",
    "attribution trainers --quick",
    "attribution heads --quick",
    "methods run --quick",
    "methods calibration --quick",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", SLOW)
def test_a_script_runs(words: str) -> None:
    folder, *options = words.split()
    if folder in ("speed", "estimators") and "--quick" in options:
        options += ["--threads", "1"]
    assert python(ROOT / "benchmarks" / folder, *options).stdout


@pytest.mark.parametrize("folder", ["methods", "attribution"])
def test_a_page_has_the_tables_of_the_results(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main = ROOT / "benchmarks" / folder / "__main__.py"
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(main), "report", "--check"])
    runpy.run_path(str(main), run_name="__main__")


def test_a_file_goes_on_and_the_last_line_of_a_key_wins(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    store = Store(path)
    for value in (1.0, 2.0):
        row = store.entry(part="cost", task="tweets")
        row["seconds"] = value
        store.save(row)
    store.save(store.entry(part="methods"))
    assert len(path.read_text().splitlines()) == 3
    again = Store(path)
    assert again.entry(task="tweets", part="cost")["seconds"] == 2.0
    assert [row["part"] for row in again.rows] == ["cost", "methods"]
    again.finish()
    assert len(path.read_text().splitlines()) == 3  # two entries, and the machine
    assert Store(path).rows[:2] == again.rows[:2]


def test_an_unfinished_line_is_skipped_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a", "x": 1}\n{"key": "b", "x')
    store, other = Store(path), Store(path)
    assert [row["key"] for row in store.rows] == ["a"]
    store.save({"key": "c"})
    other.save({"key": "d"})
    store.reload()
    assert [row["key"] for row in store.rows] == ["a", "c", "d"]


def test_the_page_keeps_what_is_around_the_tables(tmp_path: Path) -> None:
    page, marks = tmp_path / "page.md", [mark.format("script") for mark in (pages.BEGIN, pages.END)]
    page.write_text(f"a\n{marks[0]}\nold\n{marks[1]}\nb\n")
    with pytest.raises(SystemExit, match="is not what the results give"):
        pages.write(page, {"script": "new"}, check=True)
    pages.write(page, {"script": "new"}, check=False)
    assert page.read_text() == f"a\n{marks[0]}\n\nnew\n{marks[1]}\nb\n"
    pages.write(page, {"script": "new"}, check=True)
    with pytest.raises(SystemExit, match="no place"):
        pages.between("a", "new", "script")


@pytest.mark.parametrize(
    ("run", "megabytes"),
    [
        (lambda: [torch.ones(2**20 // 4) for _ in range(3)], 3),
        (lambda: torch.ones(2**20 // 4).view(2, -1)[0].add_(1), 1),
    ],
)
def test_peak_memory_counts_what_is_held_at_once(run: Any, megabytes: int) -> None:
    assert peak_memory(run, torch.device("cpu")) / 2**20 == pytest.approx(megabytes, abs=1e-3)
