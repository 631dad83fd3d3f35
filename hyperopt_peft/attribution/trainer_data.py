"""The training, evaluation and test rows of a `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from hyperopt_peft.attribution.rows import ROW, NumberedRows
from hyperopt_peft.core.labels import require_labels
from hyperopt_peft.core.logits import as_numbers
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import check_rows, read_rows
from hyperopt_peft.trainer.data import (
    batches_of,
    columns_read,
    data_of_levels,
    joined,
    label_column,
    reads_of,
    require_examples,
    require_unseen,
    shared_rows,
)
from hyperopt_peft.trainer.tags import InOrder, TagCollator
from hyperopt_peft.trainer.upper_batches import loader_of

logger = logging.get_logger(__name__)


class TrainerData:
    """The training rows of a run, the evaluation rows of Φ, and the collator of both.

    Attributes:
        train, evaluation: the rows as they were given; ``train`` of both levels if there are two.
        train_rows, evaluation_rows: the rows, numbered, with the columns that the model takes.
        of_levels: the numbered training rows of the lower and of the upper level.
        of_retraining: likewise, for a method to choose from in its second phase.
        groups: the numbers of the evaluation rows in each slice.
        shown: the columns of the training and of the evaluation rows to show.
        collate: makes a batch from a list of rows, with their numbers as `ROW`.

    Raises:
        ProblemError: all evaluation rows are training rows; there is no column ``slices``.
    """

    def __init__(self, trainer: Any, evaluation: Any, slices: str | None) -> None:
        self.trainer, self.train = trainer, trainer.train_dataset
        if getattr(trainer, "upper", None) is not None:
            self.train, prepared, self.of_levels, self.of_retraining = _rows_of_levels(trainer)
            self.train_rows = NumberedRows(prepared)
        else:
            self.train_rows = _numbered_rows(trainer, self.train, "train_dataset")
            self.of_levels = self.of_retraining = self.train_rows, None
        evaluation = self.evaluation = trainer.eval_dataset if evaluation is None else evaluation
        self.evaluation_rows = _numbered_rows(trainer, evaluation, "eval_dataset")
        count = len(self.evaluation_rows)
        common = len(shared_rows(evaluation, self.train, _reads(trainer)))
        if common == count:
            raise ProblemError(
                "evaluation: every row of it is a training row too, and would explain itself; give "
                "rows that are not in the training set"
            )
        if common:
            logger.warning("%d of %d evaluation rows are training rows too", common, count)
        columns = getattr(evaluation, "column_names", [])
        if slices is not None and slices not in columns:
            raise ProblemError(
                f"slices: the evaluation rows have no column {slices!r}, only {columns}"
            )
        self.groups: dict[str, list[int]] = {}
        of_rows = evaluation.with_format(None)[slices][:] if slices else ["all"] * count
        for row, value in enumerate(of_rows):
            self.groups.setdefault(str(value), []).append(row)
        self.shown = _shown(self.train), _shown(evaluation)
        loader = loader_of(trainer, trainer.train_dataset, "train_dataset")
        self.collate = TagCollator(InOrder(loader.collate_fn), (*getattr(trainer, "tags", ()), ROW))

    @property
    def shares(self) -> dict[str, float]:
        """The share of each slice in the evaluation rows."""
        return {name: len(rows) / len(self.evaluation_rows) for name, rows in self.groups.items()}

    def batches(self, rows: NumberedRows, chosen: Sequence[int] | None = None) -> list[Any]:
        """``rows``, or only the ``chosen`` ones, in batches on the model's device, in order."""
        args = self.trainer.args
        size, model = args.per_device_eval_batch_size, self.trainer.model
        made = batches_of(rows, self.collate, size, args.device, chosen=chosen)
        labelled = [batch for batch in made if "labels" in batch]  # later refused if not all are
        if len(labelled) < len(made):
            return made
        return [{**batch, "labels": as_numbers(model, require_labels(batch))} for batch in made]

    def test_rows(self, test: Any) -> NumberedRows:
        """``test``, numbered; ProblemError if a row is a training or an evaluation row."""
        rows = _numbered_rows(self.trainer, test, "test")
        reads = _reads(self.trainer)
        require_unseen("test", test, reads, training=self.train, evaluation=self.evaluation)
        return rows


def _rows_of_levels(trainer: Any) -> tuple[Any, Any, tuple[Any, Any], tuple[Any, Any]]:
    """``train``, ``train_rows``, ``of_levels`` and ``of_retraining`` of `TrainerData`."""
    lower, upper = trainer.phase.rows
    if upper is None:
        given, reads = lower, {*columns_read(lower, lower, trainer.row_columns)}
        numbered = given.add_column(ROW, list(range(len(given))))
        halves = data_of_levels(numbered, None, trainer.args, True, reads)
        numbers = [half[ROW][:] for half in halves]
    else:
        given = joined(train_dataset=lower, upper_dataset=upper)
        numbers = [list(range(len(lower))), list(range(len(lower), len(given)))]
    levels = []
    for name, of_level in zip(("train_dataset", "upper_dataset"), numbers, strict=True):
        rows = read_rows(trainer, getattr(trainer, name), name)
        if len(rows) != len(of_level):
            raise ProblemError(
                f"{name}: the trainer left {len(of_level) - len(rows)} rows out, so the others "
                "cannot be numbered; remove these rows first"
            )
        levels.append(rows.add_column(ROW, of_level))
    everything = joined(train_dataset=levels[0], upper_dataset=levels[1])
    everything = everything.select(np.argsort([*numbers[0], *numbers[1]]))
    both = levels[0], levels[1]
    return given, everything, both, both if upper is not None else (everything, None)


def _numbered_rows(trainer: Any, data: Any, name: str) -> NumberedRows:
    """The rows of `read_rows` with their numbers, once they are checked."""
    require_examples(name, data, by_index=True)
    check_rows(trainer.model, data, {"data_collator": trainer.data_collator})
    return NumberedRows(read_rows(trainer, data, name))


def _reads(trainer: Any) -> set[str] | None:
    """As `reads_of`; a bilevel trainer with tags keeps the columns of its own accord."""
    return getattr(trainer, "row_columns", None) or reads_of(trainer.model, trainer.args)


def _shown(data: Any) -> dict[str, Sequence[Any]]:
    """The text columns and the label column of ``data``, as they are stored."""
    if not isinstance(data, datasets.Dataset):
        return {}
    data, shown = data.with_format(None), dict[str, Sequence[Any]]()
    for name, feature in data.features.items():
        of_tokens = isinstance(feature, datasets.List)  # a label for each
        text = getattr(feature, "dtype", "") in ("string", "large_string")
        if text or (name == label_column(data) and not of_tokens):
            shown[name] = data[name][:]
            if isinstance(feature, datasets.ClassLabel):
                shown[name] = [feature.int2str(x) if x >= 0 else "" for x in shown[name]]
    return shown
