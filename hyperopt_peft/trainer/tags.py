"""Tags: columns of rows that a level reads in its batch, and neither collator nor model sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.internals import keep_columns

#: The tag that needs no column: the number of a row in the given data, the upper level's last.
INDEX = "index"


def numbered(*tables: Any) -> tuple[Any, ...]:
    """The rows of ``tables``, some of which may be None, with their numbers as `INDEX`.

    Raises:
        ProblemError: one is no `datasets.Dataset`.

    Example:
        >>> one, two = numbered(Dataset.from_dict({"x": [5, 6]}), Dataset.from_dict({"x": [7]}))
        >>> one[INDEX][:], two[INDEX][:]
        ([0, 1], [2])
    """
    done, begin = [], 0
    for rows in tables:
        if rows is not None and not isinstance(rows, Dataset):
            raise ProblemError(
                f"{INDEX}: only rows of a datasets.Dataset are numbered, got {type(rows).__name__}"
            )
        if rows is not None and INDEX not in rows.column_names:
            rows = rows.add_column(INDEX, list(range(begin, begin + len(rows))))
        begin += 0 if rows is None else len(rows)
        done.append(rows)
    return tuple(done)


@dataclass(frozen=True)
class TagCollator:
    """Calls ``collate`` on rows without ``tags``, and adds these to its batch, a number a row.

    Rows may lack a tag, such as those of an upper level that does not read it.

    Example:
        >>> collator = TagCollator(lambda rows: {"x": torch.tensor([r["x"] for r in rows])}, ["k"])
        >>> collator([{"x": 1.0, "k": 3}, {"x": 2.0, "k": 0}])
        {'x': tensor([1., 2.]), 'k': tensor([3, 0])}
    """

    collate: Callable[[Sequence[Any]], Any]
    tags: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of ``rows``."""
        tags = [tag for tag in self.tags if tag in rows[0]]
        values = {tag: torch.tensor([row[tag] for row in rows]) for tag in tags}
        return {**self.collate([without(row, self.tags) for row in rows]), **values}


def without(entries: Mapping[str, Any], tags: Iterable[str]) -> dict[str, Any]:
    """``entries``, of a row or a batch, without ``tags``."""
    return {key: value for key, value in entries.items() if key not in tags}


def keep_tags(trainer: Any, tags: Sequence[str], method: str) -> None:
    """Let the batches of ``trainer`` have the columns ``tags``.

    Raises:
        ProblemError: the prepared training rows lack one.
    """
    present = getattr(trainer.train_dataset, "column_names", None) or []
    if missing := [tag for tag in tags if tag not in present]:
        raise ProblemError(
            f"{missing[0]}: {method} reads this column, which the training rows lack as they are "
            "prepared; add it, and do not pack texts"
        )
    keep_columns(trainer, tags)
    trainer.data_collator = TagCollator(trainer.data_collator, tags)
