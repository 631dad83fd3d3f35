"""Splits rows, and finds equal ones: copies of a row stay on one side of a split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from inspect import signature
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from torch.nn import Module

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.models import base_model

#: Columns that a Trainer keeps for every model.
LABELS = ("label", "labels", "label_ids")
#: The columns of `reads_of`, or None for all.
Reads = Set[str] | None


def split_dataset(
    train: Dataset, upper_fraction: float, seed: int, reads: Reads = None
) -> tuple[Dataset, Dataset]:
    """Split the training set into the lower and the upper level's rows, by ``seed``.

    The split is stratified if the column ``label`` or ``labels`` holds classes: a ClassLabel, or
    integers that each occur at least three times on average. All copies of a row are in one level.

    Args:
        upper_fraction: the upper level's share of the different rows, in (0, 1).
        reads: the columns in which copies are equal; by default all.

    Raises:
        ProblemError: a level would be empty or lack a class, or an example has no class.

    Example:
        >>> train = Dataset.from_dict({"x": range(20), "label": [0, 1] * 10})
        >>> lower, upper = split_dataset(train, 0.2, seed=0)
        >>> len(lower), sorted(upper["label"])
        (16, [0, 0, 1, 1])
    """
    if not isinstance(train, Dataset):
        raise ProblemError(
            f"only a datasets.Dataset can be split, got {type(train).__name__}; give the upper "
            "level's examples as upper_dataset"
        )
    if not 0 < upper_fraction < 1:
        raise ProblemError(f"upper_fraction must be in (0, 1), got {upper_fraction}")
    values = classes_of(train) or []
    if None in values:
        raise ProblemError(
            f"{values.count(None)} of {len(train)} training examples have no label; remove them"
        )
    parts = hold_out(train, upper_fraction, seed, "upper_fraction", values, reads)
    for level, rows in zip(("lower", "upper"), parts, strict=True):
        if missing := {*values} - {values[row] for row in rows if values}:
            name = min(missing)
            raise ProblemError(
                f"upper_fraction: class {name!r} has only {values.count(name)} examples, and the "
                f"{level} level would get none; change upper_fraction or the data"
            )
    lower, upper = map(train.select, parts)
    return lower, upper


def hold_out(
    rows: Dataset,
    fraction: float,
    seed: int,
    argument: str,
    classes: Sequence[Any] = (),
    reads: Reads = None,
    named: Callable[[Any], str] = str,
) -> tuple[list[int], list[int]]:
    """The numbers of the other rows, and of a ``fraction`` of the different ``rows``.

    All copies of a row, equal in the columns ``reads``, are on one side. Each of ``classes``, one a
    row and ``named`` in messages, has about equal shares of both sides.

    Raises:
        ProblemError: the split is impossible; the message begins with ``argument``.
    """
    names = sorted({*classes})
    copies = defaultdict[int, list[int]](list)
    for row, first in enumerate(firsts(rows, reads)):
        copies[first].append(row)
    numbers = [names.index(classes[first]) if names else 0 for first in copies]
    impossible = f"{argument}: cannot hold out {fraction:.0%} of {len(copies)} different rows"
    if names and (rare := [names[k] for k, count in Counter(numbers).items() if count < 2]):
        raise ProblemError(
            f"{impossible}: the class {named(rare[0])!r} has 1 row, and both parts need one; add "
            "rows or remove the row"
        )
    labels = ClassLabel(names=[*map(str, names)] or ["any"])
    features = Features({"row": Value("int64"), "class": labels})  # a cast would show a bar
    table = Dataset.from_dict({"row": [*copies], "class": numbers}, features=features)
    options = {"seed": seed, "stratify_by_column": "class" if names else None}
    try:
        parts = table.train_test_split(test_size=fraction, **options)
    except ValueError as error:
        raise ProblemError(f"{impossible}: {error}") from error
    rest, held_out = (
        [*part["row"], *(k for row in part["row"] for k in copies[row][1:])]
        for part in (parts["train"], parts["test"])
    )
    return rest, held_out


def folds_of(groups: Sequence[int], count: int, seed: int = 0) -> list[list[int]]:
    """The places of ``groups`` in each of ``count`` random folds, for cross-validation.

    Equal groups, such as `firsts` has for copies of a row, are in one fold. Groups that all differ
    have the folds of ``sklearn.model_selection.KFold(count, shuffle=True, random_state=seed)``.
    """
    order = np.random.RandomState(seed).permutation(np.unique(groups))
    return [np.flatnonzero(np.isin(groups, x)).tolist() for x in np.array_split(order, count)]


def label_column(data: Dataset) -> str | None:
    """The column of ``data`` that models and collators of Transformers read as labels, if any."""
    return next((column for column in ("label", "labels") if column in data.column_names), None)


def classes_of(data: Dataset) -> list[Any] | None:
    """The entries of `label_column` if they are classes (see `split_dataset`), else None."""
    column = label_column(data)
    feature = None if column is None else data.features[column]
    integer = isinstance(feature, Value) and "int" in feature.dtype
    if not integer and not isinstance(feature, ClassLabel):
        return None
    values: list[Any] = data.with_format(None)[column][:]
    # Many different integers may be ratings or counts.
    return values if isinstance(feature, ClassLabel) or 3 * len(set(values)) <= len(data) else None


def reads_of(model: Any, args: Any) -> set[str] | None:
    """The columns that a Trainer with ``args`` keeps for ``model``; None if it keeps all."""
    if not args.remove_unused_columns:
        return None
    inputs = signature(base_model(model).forward).parameters if isinstance(model, Module) else ()
    return {*inputs, *LABELS, *(args.label_names or ())}


def columns_read(one: Dataset, other: Dataset, reads: Reads = None) -> list[str]:
    """The columns of both that are in ``reads``; without it all.

    If they are labels alone, as beside texts that a parent trainer prepares, also those of texts.
    """
    common = [column for column in one.column_names if column in other.column_names]
    read = [column for column in common if reads is None or column in reads]
    texts = [column for column in common if not is_number(one.features[column])]
    return read if {*read} - {*LABELS} else [*texts, *read] if texts else common


def is_number(kind: Any) -> bool:
    """Whether a column of this feature has numbers, or classes."""
    return isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "string" not in kind.dtype)


def shared_rows(data: Any, other: Any, reads: Reads = None) -> list[int]:
    """The indices of the examples of ``data`` that are also in ``other``; none if unknown.

    Examples are equal if they are in `columns_read`.
    """
    if data is other:
        return list(range(len(data)))
    tables = isinstance(data, Dataset) and isinstance(other, Dataset)
    if not (tables and (columns := columns_read(data, other, reads))):
        return []
    others = {*digests(other, columns)}
    return [row for row, digest in enumerate(digests(data, columns)) if digest in others]


def firsts(data: Dataset, reads: Reads = None) -> list[int]:
    """The number of the first row that is equal to each row; see `shared_rows`."""
    first: dict[int, int] = {}
    hashes = digests(data, columns_read(data, data, reads))
    return [first.setdefault(digest, row) for row, digest in enumerate(hashes)]


def digests(data: Dataset, columns: list[str]) -> Iterator[int]:
    """A hash of each stored row, independent of the format of ``data``."""
    for table in data.select_columns(columns).with_format("arrow").iter(1000):
        yield from map(hash, map(repr, table.select(columns).to_pylist()))
