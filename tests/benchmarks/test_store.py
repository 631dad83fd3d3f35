"""The store of results, the pages that are made of it, and the statistics of the mix benchmark."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import pages
from benchmarks.mix.tables import LEARNT, best_baseline, cells, named_is_good, paired, tables_of
from benchmarks.store import Store


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


def test_the_page_keeps_what_is_around_the_tables() -> None:
    begin, end = (mark.format("script") for mark in (pages.BEGIN, pages.END))
    page = pages.between(f"a\n{begin}\nold\n{end}\nb\n", "new", "script")
    assert page == f"a\n{begin}\n\nnew\n{end}\nb\n"
    with pytest.raises(SystemExit, match="no place"):
        pages.between("a", "new", "script")


#: Accuracies of two seeds, and trusted losses of two rows.
METHODS: dict[str, tuple[tuple[float, float], list[float] | None]] = {
    "trusted only": ((0.5, 0.6), [0.9, 1.1]),
    "all, equal weights": ((0.6, 0.7), [0.8, 0.8]),
    LEARNT: ((0.7, 0.9), [0.5, 0.7]),
    "learnt, no prior": ((0.9, 0.9), None),  # not judged
}


@pytest.fixture
def runs() -> Store:
    store = Store(None)
    for method, (scores, losses) in METHODS.items():
        for seed, score in enumerate(scores):
            key = {"part": "cells", "task": "trec", "model": "head", "trusted": 30, "seed": seed}
            row: dict[str, Any] = store.entry(**key, method=method)
            row |= {"accuracy": score, "loss": 1.0, "tests": 100, "passes": 10.0}
            if losses is not None:
                row["cv"] = losses
    return store


def test_the_gap_of_the_mix_is_paired_by_seed(runs: Store) -> None:
    ((_, cell),) = cells(runs)
    assert best_baseline(cell) == "all, equal weights"  # no learned mix
    middle, half = paired(cell[LEARNT], cell["all, equal weights"])  # gaps of .1 and .2
    assert middle == pytest.approx(0.15)
    assert half == pytest.approx(12.7062 * 0.05, rel=1e-4)  # t of one degree of freedom
    summary, methods = tables_of(runs).values()
    assert summary[0]["difference"] == f"+0.150 ± {half:.3f}"
    assert (methods[0]["learnt"], methods[0]["filtered"]) == ("0.800", None)


def test_the_lowest_trusted_loss_is_judged_by_test_accuracy(runs: Store) -> None:
    ((_, cell),) = cells(runs)
    assert named_is_good(cell) == [True, True]
    for row in cell["trusted only"].values():
        row["cv"] = [0.1, 0.1]  # the lowest loss, and the worst accuracy
    assert named_is_good(cell) == [False, False]
