"""Marks of the rows by which training rows were scored: these rows cannot judge the scores' use.

A file of scores has the marks in a column, so that they stay where it is renamed, sorted or edited.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256

from datasets import Dataset

COLUMN = "scored_on"


def marks_of(rows: Dataset, columns: Sequence[str]) -> list[str]:
    """A mark of each row, by its inputs: all of ``columns`` but the last, the label.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a b", "a  b "], "label": [0, 1]})
        >>> len({*marks_of(rows, ["text", "label"])})
        1
    """
    inputs = columns[:-1] or columns
    texts = (" ".join(" ".join(map(str, x)).split()) for x in zip(*(rows[c] for c in inputs)))
    # The letter keeps spreadsheets from reading a number.
    return [f"r{sha256(text.encode('utf-8', 'replace')).hexdigest()[:12]}" for text in texts]


def as_column(marks: Collection[str], count: int) -> list[str]:
    """``marks`` in ``count`` cells, of which each has one or more.

    Example:
        >>> as_column({"b", "a"}, 3), as_column({"b", "a"}, 1)
        (['a', 'b', 'a'], ['a b'])
    """
    each = sorted({*marks})
    return [" ".join(each[k::count] or each[k % len(each) :][:1]) for k in range(count)]


def marks_in(rows: Dataset) -> set[str]:
    """The marks in the column of ``rows``, none without one."""
    cells = rows[COLUMN][:] if COLUMN in rows.column_names else []
    return {mark for cell in cells if cell is not None for mark in str(cell).split()}
