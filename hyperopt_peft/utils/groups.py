"""Row numbers grouped by a value of each row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def group_rows(values: Iterable[Any]) -> dict[str, list[int]]:
    """The numbers of the rows with each value, by the value as a string, in order of appearance.

    Args:
        values: the value of each row, for example a column of a data set.

    Example:
        >>> group_rows(["wiki", "code", "wiki"])
        {'wiki': [0, 2], 'code': [1]}
    """
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(str(value), []).append(row)
    return rows
