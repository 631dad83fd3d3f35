"""Numbered rows, and a model's losses and predictions on batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyperopt_peft.core.labels import (
    counts_of_labels,
    label_weights,
    labels_are_shifted,
    row_losses,
)
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.step import MicroBatch
from hyperopt_peft.trainer.tags import without
from hyperopt_peft.utils.random_state import RandomState

#: The entry of a batch with the number of each row.
ROW = "attribution_row"


class NumberedRows(Dataset[Any]):
    """Rows with their numbers."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.column_names = [*getattr(data, "column_names", ()), ROW]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.data[row], ROW: row}


class ModelOnRows:
    """The losses and predictions of a model on batches of numbered rows.

    Args:
        precision: returns a context for the model's passes.
        tags: entries of a batch, besides `ROW`, that the model does not read.
    """

    def __init__(
        self,
        model: Any,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tags: Sequence[str] = (),
    ) -> None:
        self.model, self.precision, self.tags = model, precision, (*tags, ROW)

    def losses(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """`row_losses` in the model's precision, without dropout."""
        self.model.eval()
        with self.precision():
            return row_losses(self.model, without(batch, self.tags))

    def micro_batches(self, batches: Sequence[Any]) -> list[MicroBatch]:
        """``batches`` as one step, weighted so that its loss is the mean over all labels."""
        pairs = zip(batches, label_weights(self._counts(batches)), strict=True)
        state = RandomState.capture()
        return [MicroBatch({**batch, **weight}, state) for batch, weight in pairs]

    def _counts(self, batches: Sequence[Any]) -> list[Tensor]:
        """The number of labels that the model scores in each batch, at least one in all."""
        shifted = labels_are_shifted(self.model, without(batches[0], self.tags))
        counts = counts_of_labels(batches, shifted=shifted)
        if counts is None or not any(counts):
            raise ProblemError("labels: no row has a label that is scored; give rows with labels")
        return counts

    @torch.no_grad()
    def mean(self, batches: Sequence[Any]) -> list[Callable[[], Tensor]]:
        """Functions, one per batch, whose sum is the mean loss over the labels of ``batches``."""
        total = int(sum(self._counts(batches)))
        return [partial(lambda batch: self.losses(batch)[0].sum() / total, x) for x in batches]

    @torch.no_grad()
    def measured(self, batches: Sequence[Any]) -> dict[str, float]:
        """The mean ``loss`` over the labels of ``batches``, and for a classifier ``accuracy``."""
        numbers = {"loss": float(sum(part() for part in self.mean(batches)))}
        first = without(batches[0], self.tags)
        if first["labels"].is_floating_point() or labels_are_shifted(self.model, first):
            return numbers
        pairs = ((self.logits(batch).argmax(-1), batch["labels"]) for batch in batches)
        right = torch.cat([(guess == label)[label != IGNORED] for guess, label in pairs])
        return {**numbers, "accuracy": float(right.float().mean())}

    @torch.no_grad()
    def of_labels(self, batches: Sequence[Any]) -> Tensor:
        """The logits of each row, or of each labelled token, ``(m, classes)``."""
        pairs = ((self.logits(batch), batch["labels"]) for batch in batches)
        return torch.cat([x if label.dim() == 1 else x[label != IGNORED] for x, label in pairs])

    @torch.no_grad()
    def probabilities(self, batches: Sequence[Any]) -> Tensor:
        """The class probabilities of the rows, ``(n, classes)``."""
        return torch.cat([self.logits(x).softmax(-1) for x in batches]).to("cpu", torch.float64)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits of ``batch``."""
        self.model.eval()
        logits: Tensor = self.model(**without(batch, (*self.tags, "labels"))).logits
        return logits


def classes_of_rows(batches: Sequence[Any]) -> Tensor | None:
    """The class of each row, ``(n,)``; None if labels are not one class per row."""
    labels = [batch.get("labels") for batch in batches]
    if any(not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 1 for x in labels):
        return None
    return torch.cat(labels).cpu()
