"""The store of results, the pages that are made of it, and the statistics of the mix benchmark."""

from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.mix.tables import VERDICT, Cell, cells, lead, near_the_best, regrets
from benchmarks.store import Store
from hyperopt_peft.problems.mix_plans import EQUAL, LEARNED, SOURCES_ALIKE


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


#: Accuracies of two seeds.
METHODS = {
    EQUAL: (0.6, 0.7),
    SOURCES_ALIKE: (0.8, 0.7),
    LEARNED: (0.75, 0.95),
    VERDICT: (0.6, 0.95),  # the first method, then the learned one
}


@pytest.fixture
def cell() -> Cell:
    store = Store(None)
    for method, scores in METHODS.items():
        for seed, score in enumerate(scores):
            key = {"part": "head", "task": "trec", "trusted": 30, "seed": seed}
            store.entry(**key, method=method).update(accuracy=score, tests=100)
    (found,) = cells(store, "head").values()
    return found


def test_the_lead_of_the_mix_is_paired_by_seed(cell: Cell) -> None:
    text = dict(lead(cell, LEARNED))  # gaps of -.05 and .25
    half = 12.7062 * 0.15  # t of one degree of freedom
    assert text["difference"] == f"+0.100 ± {half:.3f}"
    assert text["best simple way"] == f"{SOURCES_ALIKE}, 0.750"


def test_regret_is_the_distance_to_the_best_method_of_a_cell(cell: Cell) -> None:
    found = {name: each[0] for name, each in regrets({"trec 30": cell}).items()}
    assert found == pytest.approx({EQUAL: 0.2, SOURCES_ALIKE: 0.1, LEARNED: 0.0, VERDICT: 0.075})


def test_the_best_of_other_seeds_is_not_chosen_by_the_seed_it_is_judged_on(cell: Cell) -> None:
    """Learned weights are the best on seed 1, each source alike on seed 0: .75 and .7."""
    found = regrets({"trec 30": cell}, left_out=True)
    assert {name: each[0] for name, each in found.items()} == pytest.approx(
        {EQUAL: 0.075, SOURCES_ALIKE: -0.025, LEARNED: -0.125, VERDICT: -0.05}
    )


def test_what_is_named_is_judged_by_the_best_of_its_seed(cell: Cell) -> None:
    assert near_the_best(cell, cell[VERDICT]) == [False, True]  # .2 below .8 ± .04, and the best
