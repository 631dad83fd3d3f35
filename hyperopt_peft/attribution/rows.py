"""The rows of a `transformers.Trainer`, numbered, and a model's losses and predictions on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.utils import logging

from hyperopt_peft.core.labels import (
    RowLosses,
    counts_of_labels,
    label_weights,
    labels_are_shifted,
    require_labels,
    row_losses,
)
from hyperopt_peft.core.logits import as_numbers
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.checks import check_rows, read_rows
from hyperopt_peft.trainer.data import batches_of, joined, require_examples
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.trainer.own_loss import BATCHES, require_row_losses
from hyperopt_peft.trainer.splits import label_column, reads_of, shared_rows
from hyperopt_peft.trainer.step import MicroBatch
from hyperopt_peft.trainer.tags import INDEX, InOrder, TagCollator, without
from hyperopt_peft.trainer.upper_batches import loader_of
from hyperopt_peft.utils.random_state import RandomState

logger = logging.get_logger(__name__)
#: Rows as a Trainer takes them: a table, or any rows by index, each by the name of its columns.
Rows: TypeAlias = datasets.Dataset | Dataset[Any] | Sequence[Mapping[str, Any]]
#: The entries of a collated batch by name.
Batch: TypeAlias = Mapping[str, Any]


class NumberedRows(Dataset[Any]):
    """Rows with their numbers."""

    def __init__(self, data: Rows) -> None:
        self.data: Any = data
        self.column_names = [*getattr(data, "column_names", ()), INDEX]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.data[row], INDEX: row}


class ModelOnRows:
    """The losses and predictions of a model on batches of numbered rows.

    Args:
        precision: returns a context for the model's passes.
        tags: entries of a batch, besides `INDEX`, that the model does not read.
        rule: the user's ``row_losses``.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tags: Sequence[str] = (),
        rule: RowLosses | None = None,
    ) -> None:
        self.model, self.precision, self.tags = model, precision, (*tags, INDEX)
        self.rule = rule

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`row_losses` in the model's precision, without dropout."""
        self.model.eval()
        with self.precision():
            return row_losses(self.model, without(batch, self.tags), self.rule)

    def micro_batches(self, batches: Sequence[Batch]) -> list[MicroBatch]:
        """``batches`` as one step, weighted so that its loss is the mean over all labels."""
        pairs = zip(batches, label_weights(self._counts(batches)), strict=True)
        state = RandomState.capture()
        return [MicroBatch({**batch, **weight}, state) for batch, weight in pairs]

    def _counts(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The number of labels that the model scores in each batch, at least one in all.

        With a rule, the numbers by whose sum its losses are divided.
        """
        if self.rule is not None:
            with torch.no_grad():
                return [self.losses(batch)[1].sum() for batch in batches]
        shifted = labels_are_shifted(self.model, without(batches[0], self.tags))
        counts = counts_of_labels(batches, shifted=shifted)
        if counts is None or not any(counts):
            raise ProblemError("labels: no row has a label that is scored; give rows with labels")
        return counts

    @torch.no_grad()
    def mean(self, batches: Sequence[Batch]) -> list[Callable[[], Tensor]]:
        """Functions, one per batch, whose sum is the mean loss over the labels of ``batches``."""
        total = torch.stack([*self._counts(batches)]).sum()
        return [partial(lambda batch: self.losses(batch)[0].sum() / total, x) for x in batches]

    @torch.no_grad()
    def probabilities(self, batches: Sequence[Batch]) -> Tensor:
        """The class probabilities of the rows, ``(n, classes)``."""
        return torch.cat([self.logits(x).softmax(-1) for x in batches]).to("cpu", torch.float64)

    def logits(self, batch: Batch) -> Tensor:
        """The logits of ``batch``."""
        self.model.eval()
        logits: Tensor = self.model(**without(batch, (*self.tags, "labels"))).logits
        return logits


class TrainerData:
    """A Trainer, its training rows, the evaluation rows of Φ, and batches of both.

    Attributes:
        trainer: the Trainer, which has a method if it is a bilevel one.
        rule: the losses of rows by ``row_losses``, or by that of a bilevel trainer; None without.
        train_rows, evaluation_rows: the rows, numbered, with the columns that the model takes; the
            training rows are those of both levels if there are two.
        shown: the columns of the training and of the evaluation rows to show.
        collate: makes a batch from a list of rows, with their numbers as `INDEX`.

    Raises:
        ProblemError: ``trainer`` is no Trainer, or has levels without a method; all evaluation
            rows are training rows.
    """

    def __init__(
        self, trainer: Trainer, evaluation: Rows | None, row_losses: RowLosses | None = None
    ) -> None:
        name = type(trainer).__name__
        if not isinstance(trainer, Trainer):
            raise ProblemError(f"training: must be a Problem or a transformers.Trainer, got {name}")
        if getattr(trainer, "method", trainer) is None:
            raise ProblemError(
                f"training: {name} has levels without a loss for each row; give it a method, or "
                "use a level of your own"
            )
        self.trainer: Any = trainer
        train = trainer.train_dataset
        phase = getattr(trainer, "phase", None)
        self.rule: RowLosses | None = row_losses or getattr(phase, "row_losses", None)
        # A bilevel trainer with tags keeps the columns of its own accord.
        columns = getattr(trainer, "row_columns", None)
        self._reads = columns or reads_of(trainer.model, trainer.args)
        if self.has_upper_level:
            lower, upper = self.trainer.phase.rows
            train = lower if upper is None else joined(train_dataset=lower, upper_dataset=upper)
        self.train_rows = self._numbered(train, "train_dataset")
        evaluation = trainer.eval_dataset if evaluation is None else evaluation
        self.evaluation_rows = self._numbered(evaluation, "eval_dataset")
        count = len(self.evaluation_rows)
        common = len(shared_rows(evaluation, train, self._reads))
        if common == count:
            raise ProblemError(
                "evaluation: every row of it is a training row too, and would explain itself; give "
                "rows that are not in the training set"
            )
        if common:
            logger.warning("%d of %d evaluation rows are training rows too", common, count)
        self.shown = _shown(train), _shown(evaluation)
        loader = loader_of(trainer, trainer.train_dataset, "train_dataset")
        tags = {*getattr(trainer, "tags", ()), INDEX}
        self.collate = TagCollator(InOrder(loader.collate_fn), sorted(tags))

    @property
    def model(self) -> Any:
        """The Trainer's present model."""
        return self.trainer.model

    @property
    def method(self) -> Method:
        """The Trainer's method; for a stock Trainer a plain `Method`, which trains alike."""
        return getattr(self.trainer, "method", None) or Method()

    @property
    def has_upper_level(self) -> bool:
        """Whether the Trainer is a bilevel one with two levels."""
        return getattr(self.trainer, "upper", None) is not None

    def _numbered(self, data: Any, name: str) -> NumberedRows:
        """The rows of `read_rows` with their numbers, once they are checked."""
        require_examples(name, data, by_index=True)
        check_rows(self.model, data, {"data_collator": self.trainer.data_collator})
        if self._reads is None and INDEX in data[0]:
            raise ProblemError(f"{INDEX}: this name is reserved for row numbers; rename the column")
        return NumberedRows(read_rows(self.trainer, data, name))

    def batches(self, rows: NumberedRows, chosen: Sequence[int] | None = None) -> list[Any]:
        """``rows``, or only the ``chosen`` ones, in batches on the model's device, in order."""
        args = self.trainer.args
        size = args.per_device_eval_batch_size
        made = batches_of(rows, self.collate, size, args.device, chosen=chosen)
        if any("labels" not in batch for batch in made):  # refused later
            return made
        labels = [as_numbers(self.model, require_labels(batch)) for batch in made]
        return [{**batch, "labels": x} for batch, x in zip(made, labels, strict=True)]

    def classes(self) -> Tensor | None:
        """The class of each training row, ``(n,)``; None if labels are not one class per row."""
        labels = [batch.get("labels") for batch in self.batches(self.train_rows)]
        if any(not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 1 for x in labels):
            return None
        return torch.cat(labels).cpu()

    def require_losses(self) -> None:
        """Raise ProblemError unless the Trainer's loss is known, or the rule gives it by row."""
        size = self.trainer.args.per_device_train_batch_size
        batches = list[Any]()
        if self.rule is not None:
            first = range(len(self.train_rows))[: size * BATCHES]
            chosen = (first[k : k + size] for k in first[::size])
            batches = [self.batches(self.train_rows, rows)[0] for rows in chosen]
        require_row_losses(self.trainer, self.rule, batches, self.collate.tags)


def _shown(data: Any) -> dict[str, Sequence[Any]]:
    """The text columns and the label column of ``data``, as they are stored."""
    if not isinstance(data, datasets.Dataset):
        return {}
    data = data.with_format(None)
    shown = dict[str, Sequence[Any]]()
    for name, feature in data.features.items():
        of_tokens = isinstance(feature, datasets.List)  # a label for each
        text = getattr(feature, "dtype", "") in ("string", "large_string")
        if text or (name == label_column(data) and not of_tokens):
            shown[name] = data[name][:]
            if isinstance(feature, datasets.ClassLabel):
                shown[name] = [feature.int2str(x) if x >= 0 else "" for x in shown[name]]
    return shown
