"""The rows of sources and the trusted rows: numbers, votes, and what is refused."""

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Value

from hyperopt_peft import ProblemError
from hyperopt_peft.problems.source_data import SourceData, by_column


def rows(begin: int, count: int = 3, **columns: Any) -> Dataset:
    labels = [k % 2 for k in range(count)]
    table = {"x": list(range(begin, begin + count)), "label": labels, **columns}
    return Dataset.from_dict(table).cast_column("label", ClassLabel(names=["no", "yes"]))


def test_rows_have_the_number_of_their_source() -> None:
    data = SourceData.of({"a": rows(0), "b": rows(10, 2)}, rows(20, 4))
    assert data.counts == {"a": 3, "b": 2, "trusted": 4}
    assert data.everything["source"][:] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert data.everything["x"][:] == [0, 1, 2, 10, 11, 20, 21, 22, 23]
    assert data.with_trusted([1, 2]).counts == {"a": 3, "b": 2, "trusted": 2}


def test_votes_and_labels_of_trusted_rows() -> None:
    """A trusted row is a vote of the last source; a row without votes is left out."""
    votes = [[0, -1], [-1, -1], [1, 0]]
    voted = rows(0, votes=votes).remove_columns("label")
    data = SourceData.of(voted, rows(20, 2))
    assert data.counts == {"0": 2, "1": 1, "trusted": 2}
    assert data.sources["votes"][:] == [[0, -1, -1], [1, 0, -1]] and data.sources["x"][:] == [0, 2]
    assert data.trusted["votes"][:] == [[-1, -1, 0], [-1, -1, 1]]
    assert data.everything.features["label"].names == ["no", "yes"]


def test_votes_may_be_probabilities() -> None:
    """A trusted row has one class, a source without a sum of 1 none."""
    votes = [[[0.3, 0.7], [1e-5, 0.0]], [[0.0, 0.0]] * 2, [[1.0, 0.0], [0.5, 0.5]]]
    voted = rows(0, votes=votes).remove_columns("label")
    of_trusted = [[[0.0, 0.0], [0.9, 0.1]]] * 2
    data = SourceData.of(voted, rows(20, 2, votes=of_trusted))
    assert data.counts == {"0": 2, "1": 1, "trusted": 2}
    assert data.sources["x"][:] == [0, 2] and data.sources["label"][:] == [1, 0]
    assert data.sources["votes"][1] == [[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]
    assert data.trusted["votes"][:] == [[[0, 0], [0, 0], [1, 0]], [[0, 0], [0, 0], [0, 1]]]
    assert data.trusted_votes is not None and data.trusted_votes.shape == (2, 2, 2)
    assert len(data.everything) == 4


def test_a_column_of_sources_is_taken_apart() -> None:
    parts = by_column(rows(0, origin=["u", "v", "u"]), "origin")
    assert {name: part["x"][:] for name, part in parts.items()} == {"u": [0, 2], "v": [1]}
    with pytest.raises(ProblemError, match="origins"):
        by_column(rows(0), "origins")


def _named(table: Dataset) -> Dataset:
    return table.cast_column("label", Value("string"))


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
        ({"a": rows(0), "b": rows(10)}, None, "trusted"),
        ({"a": rows(0), "b": rows(10)}, [{"x": 1}], "trusted: .* list"),
        (rows(0, votes=[[0], [1], [0]]), rows(20), "'votes'"),
        (rows(0, votes=[[0, -1]] * 3), rows(20), "source 1: has no votes"),
        (rows(0, votes=[[0, 1], [1], [0, 0]]), rows(20), "'votes': must have a list"),
        (rows(0, votes=[[0, -2]] * 3), rows(20), "'votes': must have a list"),
        (rows(0, votes=[[[0.2, 0.7]] * 2] * 3), rows(20), "'votes': .* sum is 1"),
        (rows(0, votes=[[[1.2, -0.2]] * 2] * 3), rows(20), "'votes': .* sum is 1"),
        (rows(0, votes=[["a", "b"]] * 3), rows(20), "'votes': must have a list"),
        (rows(0, votes=[[True, False]] * 3), rows(20), "'votes': must have a list"),
        (rows(0, votes=[[[1.0], [1.0]]] * 3), rows(20), "'votes': has 1 prob.* the class 1"),
        (rows(0, votes=[[0, 1]] * 3), rows(20, votes=[[0, 1, 1]] * 3), "'votes': those of a trust"),
        (rows(0, votes=[[0, 1]] * 3), rows(20, votes=[[[0, 1]] * 2] * 3), "those of a trusted"),
        (rows(0, votes=[[0, 1]] * 3), _named(rows(20)), "trusted: .* of classes"),
        ({"a": rows(0, source=[1, 2, 3]), "b": rows(10)}, rows(20, source=[1, 2, 3]), "'source'"),
    ],
)
def test_data_that_cannot_be_mixed_are_named(sources: Any, trusted: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        SourceData.of(sources, trusted)


def test_a_row_with_another_label_leaks_too() -> None:
    other = rows(0).remove_columns("label").add_column("label", [1, 0, 1])
    other = other.cast_column("label", ClassLabel(names=["no", "yes"]))
    with pytest.raises(ProblemError, match="3 of 3"):
        SourceData.of({"a": rows(0), "b": rows(10)}, other)
