"""Rows with their numbers, and a model's loss with a weight for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hyperopt_peft.attribution.run import RecordedStep
from hyperopt_peft.core.labels import (
    ITEMS,
    MICRO_BATCHES,
    WEIGHT,
    label_weights,
    labels_are_shifted,
    row_losses,
    weighted_mean,
)
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.data import collating
from hyperopt_peft.trainer.step import MicroBatch
from hyperopt_peft.trainer.trainer import BilevelTrainer
from hyperopt_peft.utils.models import trainable
from hyperopt_peft.utils.random_state import RandomState, replay

INDEX = "index"
#: Entries of a batch that the model does not read.
ADDED = (INDEX, WEIGHT, ITEMS, MICRO_BATCHES)


class RowWeighted(Problem):
    """The Trainer's loss with a weight for each row: Σ v_i s_i / Σ c_i over the rows of a batch.

    s_i is the summed loss of row i and c_i the count of its labels, so that at v = 1 it is the mean
    over all labels, the loss that the Trainer trains.

    Args:
        trainer: the trainer, with the model.
        weights: v, ``(n,)``.
        training: whether dropout is on.
        twice: whether the loss is differentiated twice.

    Raises:
        ProblemError: see `row_losses`.
    """

    def __init__(
        self, trainer: BilevelTrainer, weights: Tensor, *, training: bool = True, twice: bool
    ) -> None:
        self.trainer, self.weights = trainer, weights
        self.training, self.twice = training, twice
        super().__init__(trainable(trainer.model), name="training")

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Σ v_i s_i / Σ c_i."""
        sums, counts = losses_of(self.trainer, batch, training=self.training, twice=self.twice)
        loss = weighted_mean(self.weights[batch[INDEX]], sums, counts)
        return loss * batch[WEIGHT].to(loss.dtype) if WEIGHT in batch else loss


def losses_of(
    trainer: BilevelTrainer,
    batch: Mapping[str, Any],
    *,
    training: bool = False,
    twice: bool = False,
) -> tuple[Tensor, Tensor]:
    """`row_losses` of the trainer's model in its precision, ``training`` with dropout.

    Raises:
        ProblemError: as `row_losses`.
    """
    trainer.model.train(training)
    with trainer.compute_loss_context_manager():
        return row_losses(trainer.model, _model_inputs(batch), twice=twice)


def _model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ADDED}


class NumberedRows(Dataset[Any]):
    """Rows with their numbers."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.data[row], INDEX: row}


class NumberedCollator:
    """A collator that hands the numbers of the rows on, ``(n,)``."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of ``rows``, with their numbers under ``index``.

        Raises:
            ProblemError: the collator joins rows, as TRL's does with ``padding_free=True``.
        """
        index = torch.tensor([row[INDEX] for row in rows])
        plain = [{name: value for name, value in row.items() if name != INDEX} for row in rows]
        batch = self.collate(plain)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and len(labels) != len(rows):
            raise ProblemError(
                f"data_collator: {len(rows)} rows became {len(labels)}, so that a row has no loss "
                "of its own; pad them (padding_free=False)"
            )
        return {**batch, INDEX: index}


class ModelOnRows:
    """The model on rows, without dropout, a batch at a time."""

    def __init__(self, trainer: BilevelTrainer, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.trainer, self.collate = trainer, NumberedCollator(collate)

    def batches(self, rows: NumberedRows, chosen: Sequence[int] | None = None) -> list[Any]:
        """The rows, or those ``chosen``, in batches on the model's device, in order."""
        args = self.trainer.args
        data: Any = rows if chosen is None else torch.utils.data.Subset(rows, chosen)
        loader = DataLoader(data, args.per_device_eval_batch_size, collate_fn=self.collate)
        with replay(RandomState.capture()), collating("the rows"):
            return [send_to_device(batch, args.device) for batch in loader]

    def micro_batches(self, rows: NumberedRows) -> list[MicroBatch]:
        """All rows, as one step's micro-batches, with the weights for a mean over all labels."""
        batches, state = self.batches(rows), RandomState.capture()
        pairs = zip(batches, self._label_weights(batches), strict=True)
        return [MicroBatch({**batch, **weight}, state) for batch, weight in pairs]

    def _label_weights(self, batches: Sequence[Any]) -> list[dict[str, Tensor]]:
        shifted = labels_are_shifted(self.trainer.model, _model_inputs(batches[0]))
        return label_weights(batches, shifted=shifted)

    def on_rows(self, step: RecordedStep, rows: Dataset[Any], order: Iterator[int]) -> RecordedStep:
        """``step`` with micro-batches of as many ``rows``, the next ones of ``order``.

        Each has the weight of the first training row.
        """
        (update,) = step.updates
        device, batches = self.trainer.args.device, []
        for micro in update.batch:
            chosen: list[Any] = [rows[next(order)] for _ in micro.batch[INDEX]]
            batch = self.collate([{**row, INDEX: 0} for row in chosen])
            batches.append(send_to_device(batch, device))
        weights = self._label_weights(batches)
        parts = [
            MicroBatch({**batch, **weight}, micro.random_state)
            for batch, weight, micro in zip(batches, weights, update.batch, strict=True)
        ]
        return RecordedStep((replace(update, batch=parts),), step.assigned)

    @torch.no_grad()
    def losses(self, rows: NumberedRows, chosen: Sequence[int]) -> list[Callable[[], Tensor]]:
        """The mean loss over the labels of the rows ``chosen``, a part for each batch."""
        batches = self.batches(rows, chosen)
        total = int(sum(losses_of(self.trainer, batch)[1].sum() for batch in batches))
        if total == 0:
            raise ProblemError("evaluation: no row has a label; give rows with labels")
        return [partial(self._part, batch, total) for batch in batches]

    def _part(self, batch: Mapping[str, Any], total: int) -> Tensor:
        return losses_of(self.trainer, batch)[0].sum() / total

    def measure(self, rows: NumberedRows) -> Callable[[], Mapping[str, float]]:
        """A function that measures the mean loss over the labels of ``rows``.

        Where each label is the class of its own logits, the accuracy over labels too.
        """
        batches = self.batches(rows)

        @torch.no_grad()
        def measured() -> Mapping[str, float]:
            loss = correct = count = 0.0
            for batch in batches:
                sums, counts = losses_of(self.trainer, batch)
                loss, count = loss + float(sums.sum()), count + float(counts.sum())
                labels = batch["labels"]
                inputs = _model_inputs(batch)
                classes = not labels.is_floating_point()
                classes = classes and not labels_are_shifted(self.trainer.model, inputs)
                if classes:
                    predicted = self._logits(batch).argmax(-1)
                    correct += float(((predicted == labels) & (labels != IGNORED)).sum())
            if not count:
                raise ProblemError("test: no row has a label; give rows with labels")
            return {"loss": loss / count} | ({"accuracy": correct / count} if classes else {})

        return measured

    def labels(self, rows: NumberedRows) -> Tensor | None:
        """The class of each row, ``(n,)``, where each has one."""
        labels = [batch.get("labels") for batch in self.batches(rows)]
        if any(not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 1 for x in labels):
            return None
        return torch.cat(labels).cpu()

    @torch.no_grad()
    def probabilities(self, rows: NumberedRows, chosen: Sequence[int]) -> Tensor:
        """The class probabilities of the rows ``chosen``, ``(n, classes)``."""
        of_batches = [self._logits(batch).softmax(-1) for batch in self.batches(rows, chosen)]
        return torch.cat(of_batches).to("cpu", torch.float64)

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        self.trainer.model.eval()
        inputs = {name: value for name, value in _model_inputs(batch).items() if name != "labels"}
        logits: Tensor = self.trainer.model(**inputs).logits
        return logits
