"""The rows of several sources and the trusted rows: what `SourceTrainer` asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.data_sources import SOURCE
from hyperopt_peft.trainer.data import joined, label_column, require_examples, shared
from hyperopt_peft.utils.groups import group_rows

#: The name of the trusted rows among the sources.
TRUSTED = "trusted"


def require_sources(sources: Any, trusted: Any = None) -> None:
    """Raise ProblemError unless ``sources`` are data sets by name that fit the trusted rows.

    Raises:
        ProblemError: one source alone; a source without rows, or no `datasets.Dataset`; data sets
            of different columns; or trusted rows that are in a source too.

    Example:
        >>> rows = Dataset.from_dict({"x": [0, 1], "label": [0, 1]})
        >>> require_sources({"web": rows, "forum": rows})
        >>> require_sources({"web": rows, "forum": rows}, trusted=rows)
        Traceback (most recent call last):
        ...
        hyperopt_peft.errors.ProblemError: trusted: 2 of 2 rows are in a source too, ...
    """
    if not isinstance(sources, Mapping) or len(sources) < 2:
        names = sorted(sources) if isinstance(sources, Mapping) else type(sources).__name__
        raise ProblemError(f"sources: must map two or more names to data sets, got {names}")
    if trusted is not None and TRUSTED in sources:
        raise ProblemError(f"source {TRUSTED!r}: the trusted rows have that name; choose another")
    parts = {f"source {name!r}": rows for name, rows in sources.items()}
    parts |= {} if trusted is None else {TRUSTED: trusted}
    columns: set[str] | None = None
    for name, rows in parts.items():
        require_examples(name, rows)
        if not isinstance(rows, Dataset):
            raise ProblemError(f"{name}: must be a datasets.Dataset, got {type(rows).__name__}")
        columns = columns or {*rows.column_names}
        if SOURCE in columns:
            raise ProblemError(
                f"column {SOURCE!r}: has the number of a row's source here; rename or remove it"
            )
        if {*rows.column_names} != columns:
            raise ProblemError(
                f"{name}: has the columns {sorted(rows.column_names)}, and another source "
                f"{sorted(columns)}; give all the same ones"
            )
    if trusted is None:
        return
    # A row leaks with another label too.
    texts = trusted.select_columns([x for x in trusted.column_names if x != label_column(trusted)])
    if common := shared(texts, joined(**sources)):
        raise ProblemError(
            f"trusted: {common} of {len(trusted)} rows are in a source too, so that they judge "
            "what was trained on them; remove them from the sources"
        )


def by_column(rows: Dataset, column: str) -> dict[str, Dataset]:
    """The rows of each value of ``column``, without the column, by the value.

    Raises:
        ProblemError: there is no such column.

    Example:
        >>> rows = Dataset.from_dict({"x": [0, 1, 2], "origin": ["wiki", "code", "wiki"]})
        >>> {name: each["x"][:] for name, each in by_column(rows, "origin").items()}
        {'wiki': [0, 2], 'code': [1]}
    """
    if column not in rows.column_names:
        raise ProblemError(f"column {column!r}: the rows have only {rows.column_names}")
    groups = group_rows(rows[column])
    rows = rows.remove_columns(column)
    return {name: rows.select(numbers) for name, numbers in groups.items()}
