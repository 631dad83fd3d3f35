"""The store of results, and the pages that are made of it."""

from pathlib import Path

import pytest

from benchmarks import pages
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
