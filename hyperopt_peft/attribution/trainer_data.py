"""The rows of a `transformers.Trainer` that are trained on, explained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers.utils import logging

from hyperopt_peft.attribution.rows import NumberedRows
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import check_labels
from hyperopt_peft.trainer.data import label_column, require_examples, shared
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils.groups import group_rows

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainerData:
    """The rows of a run, those of Φ, and the collator of both.

    Attributes:
        train: the rows that are trained on, of both levels where there are two.
        evaluation: the rows of Φ.
        train_rows, evaluation_rows: the same with the columns that the model takes.
        groups: the numbers of the evaluation rows of each slice.
        collate: makes a batch from a list of rows.
    """

    train: Any
    evaluation: Any
    train_rows: NumberedRows
    evaluation_rows: NumberedRows
    groups: Mapping[str, list[int]]
    collate: Any

    @classmethod
    def read(cls, trainer: Any, evaluation: Any, slices: str | None) -> TrainerData:
        """The rows that are trained on and those of Φ, which are others."""
        train = trainer.train_dataset if level_count(trainer) == 1 else trainer.all_rows()
        train_rows = _numbered_rows(trainer, train, "train_dataset")
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
        groups = {"all": list(range(count))}
        if slices is not None:
            columns = getattr(evaluation, "column_names", [])
            if slices not in columns:
                raise ProblemError(
                    f"slices: the evaluation rows have no column {slices!r}, only {columns}"
                )
            groups = group_rows(evaluation[slices])
        collate = loader_of(trainer, trainer.train_dataset, "train_dataset").collate_fn
        return cls(train, evaluation, train_rows, evaluation_rows, groups, collate)

    def test_rows(self, trainer: Any, test: Any) -> NumberedRows:
        """``test`` with the columns that the model takes.

        Raises:
            ProblemError: a row of it is a training or evaluation row, or as `_numbered_rows`.
        """
        rows = _numbered_rows(trainer, test, "test")
        for name, other in (("training", self.train), ("evaluation", self.evaluation)):
            if common := len(rows) if test is other else shared(test, other):
                raise ProblemError(
                    f"test: {common} of {len(rows)} rows are {name} rows too, which the scores "
                    "have seen; remove them"
                )
        return rows


def level_count(trainer: Any) -> int:
    """How many levels ``trainer`` trains."""
    return 1 if getattr(trainer, "upper", None) is None else 2


def _numbered_rows(trainer: Any, data: Any, name: str) -> NumberedRows:
    """``data`` with the columns that the model takes.

    Raises:
        ProblemError: no data, or data without a length or an index.
    """
    require_examples(name, data, by_index=True)
    if isinstance(data, datasets.Dataset) and trainer.args.remove_unused_columns:
        data = data.select_columns(loader_of(trainer, data, name).dataset.column_names)
    return NumberedRows(data)


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
        shown[label] = [data.features[label].int2str(value) for value in shown[label]]
    return shown
