"""The rows of a `transformers.Trainer` that are trained on, explained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from hyperopt_peft.attribution.rows import ROW, NumberedRows
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import check_labels
from hyperopt_peft.trainer.data import (
    batches_of,
    joined,
    label_column,
    require_examples,
    shared,
    split_dataset,
)
from hyperopt_peft.trainer.tags import TagCollator
from hyperopt_peft.trainer.upper_batches import loader_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainerData:
    """The rows of a run, those of Φ, and how both are read.

    Attributes:
        train: the rows that are trained on, of both levels where there are two.
        evaluation: the rows of Φ.
        train_rows, evaluation_rows: the same with the columns that the model takes.
        of_levels: the training rows with their numbers, the lower and the upper level's.
        of_retraining: likewise, from which a method takes those of its second phase.
        groups: the numbers of the evaluation rows of each slice.
        collate: makes a batch from a list of rows, with the numbers as `ROW`.
        trainer: the trainer.
    """

    train: Any
    evaluation: Any
    train_rows: NumberedRows
    evaluation_rows: NumberedRows
    of_levels: tuple[Any, Any]
    of_retraining: tuple[Any, Any]
    groups: Mapping[str, list[int]]
    collate: TagCollator
    trainer: Any

    @classmethod
    def read(cls, trainer: Any, evaluation: Any, slices: str | None) -> TrainerData:
        """The rows that are trained on and those of Φ, which are others."""
        train = trainer.train_dataset
        if getattr(trainer, "upper", None) is not None:
            train, prepared, of_levels, of_retraining = _rows_of_levels(trainer)
            train_rows = NumberedRows(prepared)
        else:
            train_rows = _numbered_rows(trainer, train, "train_dataset")
            of_levels = of_retraining = train_rows, None
        check_labels(trainer.model, train, {"data_collator": trainer.data_collator})
        evaluation = trainer.eval_dataset if evaluation is None else evaluation
        evaluation_rows = _numbered_rows(trainer, evaluation, "eval_dataset")
        count = len(evaluation_rows)
        common = count if evaluation is train else shared(evaluation, train)
        if common == count:
            raise ProblemError(
                "evaluation: every row of it is a training row too, and would explain itself; give "
                "rows that are not trained on"
            )
        if common:
            logger.warning("%d of %d evaluation rows are training rows too", common, count)
        groups: dict[str, list[int]] = {}
        if slices is None:
            groups["all"] = list(range(count))
        else:
            columns = getattr(evaluation, "column_names", [])
            if slices not in columns:
                raise ProblemError(
                    f"slices: the evaluation rows have no column {slices!r}, only {columns}"
                )
            for row, value in enumerate(evaluation[slices]):
                groups.setdefault(str(value), []).append(row)
        loader = loader_of(trainer, trainer.train_dataset, "train_dataset")
        collate = TagCollator(loader.collate_fn, (*getattr(trainer, "tags", ()), ROW))
        sets = train, evaluation, train_rows, evaluation_rows, of_levels, of_retraining
        return cls(*sets, groups, collate, trainer)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each slice in the evaluation rows."""
        return {name: len(rows) / len(self.evaluation_rows) for name, rows in self.groups.items()}

    def batches(self, rows: NumberedRows, chosen: Sequence[int] | None = None) -> list[Any]:
        """``rows``, or those ``chosen``, in batches on the model's device, in order."""
        args = self.trainer.args
        return batches_of(
            rows, self.collate, args.per_device_eval_batch_size, args.device, chosen=chosen
        )

    def test_rows(self, test: Any) -> NumberedRows:
        """``test``, of which no row may be known, with the columns that the model takes."""
        rows = _numbered_rows(self.trainer, test, "test")
        for name, other in (("training", self.train), ("evaluation", self.evaluation)):
            if common := len(rows) if test is other else shared(test, other):
                raise ProblemError(
                    f"test: {common} of {len(rows)} rows are {name} rows too, which the scores "
                    "have seen; remove them"
                )
        return rows


def _rows_of_levels(trainer: Any) -> tuple[Any, Any, tuple[Any, Any], tuple[Any, Any]]:
    """The given rows of both levels; prepared in this order; by level; and of the second phase."""
    args, (lower, upper) = trainer.args, trainer._rows
    if upper is None:
        given, seed = lower, args.seed if args.data_seed is None else args.data_seed
        numbered = given.add_column(ROW, list(range(len(given))))
        halves = split_dataset(numbered, args.upper_fraction, seed)
        numbers = [half[ROW][:] for half in halves]
    else:
        given = joined(train_dataset=lower, upper_dataset=upper)
        numbers = [list(range(len(lower))), list(range(len(lower), len(given)))]
    levels = []
    for name, of_level in zip(("train_dataset", "upper_dataset"), numbers, strict=True):
        rows = _selected(trainer, getattr(trainer, name), name)
        if len(rows) != len(of_level):
            raise ProblemError(
                f"{name}: the trainer left {len(of_level) - len(rows)} rows out, so that the rest "
                "cannot be numbered; remove them before"
            )
        levels.append(rows.add_column(ROW, of_level))
    everything = joined(train_dataset=levels[0], upper_dataset=levels[1])
    everything = everything.select(np.argsort([*numbers[0], *numbers[1]]))
    both = levels[0], levels[1]
    return given, everything, both, both if upper is not None else (everything, None)


def _numbered_rows(trainer: Any, data: Any, name: str) -> NumberedRows:
    """`_selected` rows with their numbers."""
    require_examples(name, data, by_index=True)
    return NumberedRows(_selected(trainer, data, name))


def _selected(trainer: Any, data: Any, name: str) -> Any:
    """``data`` with the columns that the model takes."""
    if isinstance(data, datasets.Dataset) and trainer.args.remove_unused_columns:
        data = data.select_columns(loader_of(trainer, data, name).dataset.column_names)
    return data


def shown_columns(data: Any) -> dict[str, Sequence[Any]]:
    """Text and the label of each row of ``data``, to show."""
    if not isinstance(data, datasets.Dataset):
        return {}
    label = label_column(data)
    if label and isinstance(data.features[label], datasets.List):  # a number for each token
        label = None
    shown = {
        name: data[name][:]
        for name, feature in data.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string") or name == label
    }
    if label and isinstance(data.features[label], datasets.ClassLabel):
        name = data.features[label].int2str
        shown[label] = [name(value) if value >= 0 else "" for value in shown[label]]
    return shown
