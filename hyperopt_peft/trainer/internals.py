"""Private names of `transformers` and TRL, read on first use; tests/contract tests each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import Trainer

from hyperopt_peft.core.labels import ENTRIES
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.tags import marks, without

#: Files without which the Trainer does not resume. The optimizer's file is left out, since FSDP
#: names it differently.
NEEDED = ("scheduler.pt", "trainer_state.json")

#: What the Trainer calls on each batch, to move it to the device.
PREPARES = ("_prepare_inputs", "_prepare_input")


def prepared(trainer: Any, batch: Any) -> Any:
    """``batch`` on the device, as overrides of `PREPARES` change it; tags keep their rows."""
    batch = send_to_device(batch, trainer.args.device, non_blocking=True)
    if all(getattr(type(trainer), n, None) is getattr(Trainer, n, None) for n in PREPARES):
        return batch
    if not isinstance(batch, Mapping):
        return trainer._prepare_inputs(batch)
    tags = trainer.tags
    read = without(batch, (*tags, *ENTRIES))
    before = marks(read)
    result = trainer._prepare_inputs({**read})
    after = marks(result)
    if changed := [n for n in before if tags and n != "labels" and after.get(n) != before[n]]:
        raise ProblemError(
            f"{trainer.parent().__name__}: _prepare_inputs changes {changed[0]}, so that {tags[0]} "
            "may be beside other rows; change rows in the collator"
        )
    return {**result, **{name: x for name, x in batch.items() if name not in read}}


@contextmanager
def packed_with(names: Sequence[str]) -> Iterator[None]:
    """Let TRL's trainers that are constructed in the body pack the columns ``names`` too.

    TRL packs only columns of lists as long as the row's tokens. So the row's entry in a column of
    ``names`` is repeated for each token.
    """
    select: Any = Dataset.select_columns

    def select_too(rows: Dataset, columns: Any, **options: Any) -> Dataset:
        tags = [name for name in names if "input_ids" in columns and name in rows.column_names]
        if tags:
            rows = rows.map(lambda row: {tag: [row[tag]] * len(row["input_ids"]) for tag in tags})
        selected: Dataset = select(rows, [*columns, *tags], **options)
        return selected

    Dataset.select_columns = select_too
    try:
        yield
    finally:
        Dataset.select_columns = select


#: Attributes that TRL's trainers change in each call of ``compute_loss``.
METRICS = ("_metrics", "_stored_metrics", "_total_train_tokens")


def counters_of(trainer: Trainer) -> dict[str, int]:
    """The metrics that count over the whole run; TRL does not save them."""
    values = vars(trainer)
    return {name: values[name] for name in METRICS if isinstance(values.get(name), int)}


@contextmanager
def metrics_restored(trainer: Trainer) -> Iterator[None]:
    """Restore the metrics after the body, which evaluates the loss."""
    before = {name: deepcopy(vars(trainer)[name]) for name in METRICS if name in vars(trainer)}
    state, tokens = vars(trainer.state), deepcopy(vars(trainer.state).get("tokens"))  # of axolotl
    try:
        yield
    finally:
        vars(trainer).update(before)
        state.pop("tokens", None)
        state.update({} if tokens is None else {"tokens": tokens})
