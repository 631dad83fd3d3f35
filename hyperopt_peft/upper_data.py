"""The upper level's examples: a part of the training set, in batches by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from torch.utils.data import IterableDataset

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.random_state import RandomState, replay


def split_dataset(
    train: Dataset, upper_fraction: float, seed: int, label: str | None = None
) -> tuple[Dataset, Dataset]:
    """The lower and the upper level's part of the training set, seeded.

    Stratified where ``label`` (by default the column ``label`` or ``labels``) holds classes: a
    ClassLabel, or whole numbers with at least three rows for each on average.

    Raises:
        ProblemError: the split would leave a level empty or without one of the classes, or
            ``train`` has no such column.
    """
    if not isinstance(train, Dataset):
        raise ProblemError(
            f"only a datasets.Dataset can be split, got {type(train).__name__}; give the upper "
            "level's examples as upper_dataset"
        )
    if not 0 < upper_fraction < 1:
        raise ProblemError(f"upper_fraction must be in (0, 1), got {upper_fraction}")
    if label is not None and label not in train.column_names:
        raise ProblemError(f"the training set has no column {label!r}, only {train.column_names}")
    column = label or next((c for c in ("label", "labels") if c in train.column_names), None)
    classes = column is not None and _holds_classes(train, column)
    rows = Dataset.from_dict({"row": range(len(train))})
    if classes:
        values = train.with_format(None)[column][:]
        names = sorted(set(values))
        stratum = [names.index(value) for value in values]
        rows = rows.add_column("class", stratum).cast_column(
            "class", ClassLabel(names=[str(name) for name in names])
        )
    where = f"cannot give {upper_fraction:.0%} of {len(train)} training examples to the upper level"
    try:
        parts = rows.train_test_split(
            test_size=upper_fraction, seed=seed, stratify_by_column="class" if classes else None
        )
    except ValueError as error:
        raise ProblemError(f"{where}: {error}") from error
    if classes:
        counts = Counter(stratum)
        for part, level in ((parts["train"], "lower"), (parts["test"], "upper")):
            missing = sorted(set(counts) - set(part["class"][:]))
            if missing:
                raise ProblemError(
                    f"{where}: class {names[missing[0]]!r} has only {counts[missing[0]]} examples, "
                    f"and the {level} level would get none; change upper_fraction or the data"
                )
    return train.select(parts["train"]["row"][:]), train.select(parts["test"]["row"][:])


def _holds_classes(data: Dataset, column: str) -> bool:
    feature = data.features[column]
    if isinstance(feature, ClassLabel):
        return True
    # Whole numbers are classes where each of them is found again and again, ratings or counts not.
    whole = isinstance(feature, Value) and "int" in feature.dtype
    return whole and 3 * len(set(data.with_format(None)[column][:])) <= len(data)


def require_apart(lower: Any, upper: Any, evaluation: Any) -> None:
    """Raise ProblemError where two of the data sets are one, or the levels' share an example."""
    sets = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    for held_out in sets:
        if held_out is not None and (upper is held_out or _key(upper) == _key(held_out)):
            raise ProblemError(
                "eval_dataset is given as the upper level's data: then it is trained on, and "
                "measures nothing; give a part of the training set, or upper_fraction"
            )
    if isinstance(lower, Dataset) and isinstance(upper, Dataset):
        columns = [c for c in lower.column_names if c in upper.column_names]
        if not columns:
            raise ProblemError(
                f"train_dataset and upper_dataset have no column in common: {lower.column_names} "
                f"and {upper.column_names}"
            )
        lower, upper = (part.select_columns(columns).with_format(None) for part in (lower, upper))
        seen = {repr(row) for row in lower}
        common = sum(repr(row) in seen for row in upper)
        if common:
            raise ProblemError(
                f"{common} of {len(upper)} examples of upper_dataset are in train_dataset too: the "
                "upper level must not judge on what the lower one fits; take them out of one"
            )


def _key(data: Any) -> Any:
    return getattr(data, "_fingerprint", None) or id(data)


class UpperBatches:
    """The upper level's batches, each a function of its number alone, so that a run can resume.

    Args:
        data: examples by index, with a length.
        size: examples a batch and process.
        seed: of the order, which changes from epoch to epoch.
        collate: makes a batch from a list of examples.
        rank, processes: which share of each batch is this process's.

    Raises:
        ProblemError: no examples, or an iterable data set, which has no order to return to.
    """

    def __init__(
        self,
        data: Any,
        size: int,
        *,
        seed: int,
        collate: Callable[[Sequence[Any]], Any],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            raise ProblemError(
                "the upper level's data must have examples by index and a length, got "
                f"{type(data).__name__}; give a map-style upper_dataset"
            )
        if len(data) < processes:
            raise ProblemError(
                f"the upper level has {len(data)} examples for {processes} processes; raise "
                "upper_fraction or give a larger upper_dataset"
            )
        self.data, self.seed, self.collate = data, seed, collate
        self.rank, self.processes = rank, processes
        self.size = min(size, len(data) // processes)
        self.per_epoch = len(data) // (self.size * processes)

    def batch(self, number: int) -> Any:
        """This process's share of batch ``number``, from 0; an epoch drops a smaller last one."""
        epoch, position = divmod(number, self.per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data), generator=generator)
        begin = (position * self.processes + self.rank) * self.size
        rows = order[begin : begin + self.size].tolist()
        # Also where an example or the collator draws random numbers.
        with replay(RandomState.seeded((), self.seed, number, self.rank)):
            return self.collate([self.data[row] for row in rows])
