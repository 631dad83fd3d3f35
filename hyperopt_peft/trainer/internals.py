"""Private names of `transformers` and TRL, each with a test in tests/contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

if TYPE_CHECKING:
    from transformers import Trainer

#: Files of a checkpoint without which the Trainer does not resume. The optimizer's has a name of
#: its own under FSDP.
NEEDED = (SCHEDULER_NAME, TRAINER_STATE_NAME)


def save_checkpoint(trainer: Trainer) -> None:
    """Write a checkpoint now; the public interface writes one only after a complete step."""
    trainer._save_checkpoint(trainer.model, None)


def keep_columns(trainer: Trainer, names: Sequence[str]) -> None:
    """Let the trainer hand the columns ``names`` to its collator, besides those of the model."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, *names]


@contextmanager
def packed_with(names: Sequence[str]) -> Iterator[None]:
    """Let TRL's trainers that are made in the body pack the columns ``names`` beside the tokens.

    TRL selects the columns to pack, whose rows must be lists of one length: here a row's number is
    repeated for each of its tokens.
    """
    select: Any = Dataset.select_columns

    def select_too(rows: Dataset, columns: Any, **options: Any) -> Dataset:
        kept = [name for name in names if "input_ids" in columns and name in rows.column_names]
        if kept:
            rows = rows.map(lambda row: {k: [row[k]] * len(row["input_ids"]) for k in kept})
        selected: Dataset = select(rows, [*columns, *kept], **options)
        return selected

    Dataset.select_columns = select_too
    try:
        yield
    finally:
        Dataset.select_columns = select


#: What the ``compute_loss`` of TRL's trainers counts at each call.
METRICS = ("_metrics", "_stored_metrics", "_total_train_tokens")


def counters_of(trainer: Trainer) -> dict[str, int]:
    """The metrics that count over the whole run, which TRL does not save."""
    own = vars(trainer)
    return {name: own[name] for name in METRICS if isinstance(own.get(name), int)}


@contextmanager
def metrics_restored(trainer: Trainer) -> Iterator[None]:
    """Restore afterwards what evaluations of the loss in the body add to the metrics."""
    before = {name: deepcopy(vars(trainer)[name]) for name in METRICS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before)
