"""The rows of sources and the trusted rows: what is refused."""

from typing import Any

import pytest
from datasets import ClassLabel, Dataset

from hyperopt_peft import ProblemError
from hyperopt_peft.problems.source_data import by_column, require_sources


def rows(begin: int, count: int = 3, **columns: Any) -> Dataset:
    labels = [k % 2 for k in range(count)]
    table = {"x": list(range(begin, begin + count)), "label": labels, **columns}
    return Dataset.from_dict(table).cast_column("label", ClassLabel(names=["no", "yes"]))


def test_a_column_of_sources_is_taken_apart() -> None:
    parts = by_column(rows(0, origin=["u", "v", "u"]), "origin")
    assert {name: part["x"][:] for name, part in parts.items()} == {"u": [0, 2], "v": [1]}
    with pytest.raises(ProblemError, match="origins"):
        by_column(rows(0), "origins")


@pytest.mark.parametrize(
    ("sources", "trusted", "named"),
    [
        ({"a": rows(0)}, rows(20), "two or more"),
        ({"a": rows(0), "trusted": rows(10)}, rows(20), "trusted"),
        ([rows(0), rows(10)], rows(20), "two or more"),
        ({"a": rows(0), "b": rows(10).select([])}, rows(20), "source 'b'"),
        ({"a": rows(0), "b": rows(10, y=[1, 2, 3])}, rows(20), "source 'b'.*'y'"),
        ({"a": rows(0), "b": rows(10)}, rows(11), "2 of 3 rows"),
        ({"a": rows(0), "b": rows(10)}, rows(20).select([]), "trusted"),
        ({"a": rows(0), "b": rows(10)}, [{"x": 1}], "trusted: .* list"),
        ({"a": rows(0), "b": [{"x": 1}]}, None, "source 'b': .* list"),
        ({"a": rows(0), "b": rows(10, y=[1, 2, 3])}, None, "source 'b'.*'y'"),
        ({"a": rows(0, source=[1, 2, 3]), "b": rows(10)}, None, "'source'"),
        ({"a": rows(0, source=[1, 2, 3]), "b": rows(10)}, rows(20, source=[1, 2, 3]), "'source'"),
    ],
)
def test_data_that_are_no_sources_are_named(sources: Any, trusted: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        require_sources(sources, trusted)


def test_a_row_with_another_label_leaks_too() -> None:
    other = rows(0).remove_columns("label").add_column("label", [1, 0, 1])
    other = other.cast_column("label", ClassLabel(names=["no", "yes"]))
    with pytest.raises(ProblemError, match="3 of 3"):
        require_sources({"a": rows(0), "b": rows(10)}, other)
