"""The levels' data sets: checks, joins, batches, and what a parent trainer prepares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from accelerate.utils import send_to_device
from datasets import Dataset, concatenate_datasets
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.splits import Reads, columns_read, is_number, shared_rows, split_dataset
from hyperopt_peft.utils.random_state import RandomState, replay

logger = logging.get_logger(__name__)
#: Names in the dict of evaluation sets that a parent trainer prepares.
EVALUATION, UPPER = "eval", "upper_dataset"


def data_of_levels(train: Any, upper: Any, args: Any, bilevel: bool, reads: Reads) -> Any:
    """The data of the lower and the upper level; ``train`` is split if ``upper`` is None."""
    require_examples("train_dataset", train)
    if not bilevel and upper is not None:
        raise ProblemError("upper_dataset: there is no upper level; leave upper_dataset out")
    if bilevel and upper is None:
        seed = args.seed if args.data_seed is None else args.data_seed
        train, upper = split_dataset(train, args.upper_fraction, seed, reads=reads)
    epoch = [n for n in ("logging", "eval", "save") if getattr(args, f"{n}_strategy") == "epoch"]
    if epoch and not has_length(train):
        raise ProblemError(
            f'{epoch[0]}_strategy: a stream is one epoch of max_steps steps; give "steps"'
        )
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and has_length(train) and len(train) < batch:
        raise ProblemError(
            f"dataloader_drop_last: train_dataset has {len(train)} examples, fewer than a batch "
            f"of {batch}; lower per_device_train_batch_size"
        )
    return train, upper


def warn_of_repeated_rows(train: Any, args: Any) -> None:
    """Warn if accelerate repeats rows to fill an epoch's last batch on all processes."""
    batch = args.train_batch_size * args.world_size
    uneven = args.world_size > 1 and has_length(train) and len(train) % batch
    if uneven and args.should_log and not args.dataloader_drop_last:
        logger.warning(
            f"train_dataset: {batch - uneven} rows are repeated in an epoch's last batch and count "
            f"twice; set dataloader_drop_last=True, or give a multiple of {batch} rows"
        )


def with_upper(evaluation: Any, upper: Any, args: Any) -> Any:
    """A dict of the evaluation data and ``upper``, so that a parent prepares both the same way.

    Nothing is added if ``args`` asks for evaluation without data: the Trainer then raises an error.
    """
    if upper is None or (evaluation is None and args.eval_strategy != "no"):
        return evaluation
    if not isinstance(evaluation, Mapping):
        evaluation = {} if evaluation is None else {EVALUATION: evaluation}
    return {**evaluation, UPPER: upper}


def without_upper(prepared: Any, evaluation: Any, upper: Any) -> tuple[Any, Any]:
    """Undo `with_upper`: the prepared evaluation data, shaped as ``evaluation``, and ``upper``."""
    if upper is None:
        return prepared, None
    if not isinstance(prepared, Mapping) or UPPER not in prepared:
        raise ProblemError(
            f"{UPPER}: the trainer does not keep a dict of data sets as eval_dataset, in which "
            "it prepares the upper level's data; let it take such a dict"
        )
    rest = dict(prepared)
    upper = rest.pop(UPPER)
    return (rest if isinstance(evaluation, Mapping) else rest.get(EVALUATION)), upper


def require_examples(name: str, data: Any, *, by_index: bool = False) -> None:
    """Raise ProblemError if ``data``, the argument ``name``, is not a data set or is empty.

    With ``by_index`` it must also have a length and examples by index.

    Example:
        >>> require_examples("train_dataset", [])
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: train_dataset has no examples; give it some
    """
    if data is None:
        raise ProblemError(f"{name}: there is none; give the trainer one")
    if isinstance(data, str | Mapping):
        raise ProblemError(
            f"{name} must be one data set, got a {type(data).__name__}; give one part of it, "
            f'such as {name}["train"]'
        )
    if by_index and (
        isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and has_length(data))
    ):
        raise ProblemError(
            f"{name} must have examples by index and a length, so that a resumed run reads the "
            f"same batches; got a {type(data).__name__}"
        )
    if has_length(data) and len(data) == 0:
        raise ProblemError(f"{name} has no examples; give it some")


def joined(**tables: Any) -> Any:
    """The rows of ``tables``, one table after another.

    Raises:
        ProblemError: a table is empty or not a data set, or their columns differ.

    Example:
        >>> rows = Dataset.from_dict({"x": [1, 2]})
        >>> joined(train_dataset=rows, upper_dataset=rows)["x"][:]
        [1, 2, 1, 2]
    """
    for name, rows in tables.items():
        require_examples(name, rows)
    try:
        return concatenate_datasets(list(tables.values()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ProblemError(f"{' and '.join(tables)} do not join: {error}") from error


@contextmanager
def collating(name: str) -> Iterator[None]:
    """Turn a data collator's errors in the body, on data ``name``, into a ProblemError."""
    try:
        yield
    except ProblemError:
        raise
    except (TypeError, ValueError, LookupError) as error:
        raise ProblemError(
            f"the data collator cannot batch examples of {name} ({error}); use a data_collator "
            "that pads, such as DataCollatorWithPadding, and remove text columns"
        ) from error


def batches_of(
    rows: Any,
    collate: Callable[[Sequence[Any]], Any],
    size: int,
    device: Any,
    *,
    chosen: Sequence[int] | None = None,
) -> list[Any]:
    """``rows``, or those with numbers ``chosen``, in batches; the random state does not change."""
    numbers = range(len(rows)) if chosen is None else chosen
    parts = [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
    with replay(RandomState.capture()), collating("the rows"):
        return [send_to_device(collate([rows[k] for k in part]), device) for part in parts]


def require_apart(lower: Any, upper: Any, evaluation: Any, reads: Reads = None) -> None:
    """Raise ProblemError if ``upper`` shares rows with ``lower``, or is in ``evaluation``.

    It may share some with an evaluation set, with a warning.
    """
    require_examples("upper_dataset", upper, by_index=True)
    for held_out in evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]:
        common = len(shared_rows(held_out, upper, reads))
        of_upper = len(shared_rows(upper, held_out, reads))
        if of_upper == len(upper) or (common and common == len(held_out)):
            raise ProblemError(
                "eval_dataset is given as the upper level's data or a part of it, so the "
                "evaluation would be on training data; evaluate on others, or give upper_fraction"
            )
        if common:
            logger.warning_once(f"eval_dataset: {common} examples are in upper_dataset too")
    if isinstance(lower, Dataset) and isinstance(upper, Dataset) and not columns_read(lower, upper):
        raise ProblemError(
            f"train_dataset and upper_dataset have no column in common: {lower.column_names} "
            f"and {upper.column_names}; rename the columns"
        )
    if known := shared_rows(upper, lower, reads):
        raise ProblemError(
            f"{len(known)} of {len(upper)} examples of upper_dataset are in train_dataset too, so "
            "they are not held out; remove them from one of the two"
        )


def require_same_layout(lower: Any, upper: Any) -> None:
    """Raise ProblemError if two text data sets differ in columns other than columns of numbers.

    A trainer that tokenizes them reads the training set's columns to decide which tokens to score.
    """
    if not (isinstance(lower, Dataset) and isinstance(upper, Dataset)):
        return
    if "input_ids" in columns_read(lower, upper):
        return
    one, two = ({n for n, x in d.features.items() if not is_number(x)} for d in (lower, upper))
    if other := sorted(one ^ two):
        raise ProblemError(
            f"upper_dataset: has other columns than train_dataset ({', '.join(other)}); give both "
            "the same layout"
        )


def require_unseen(name: str, rows: Any, reads: Reads = None, **others: Any) -> None:
    """Raise ProblemError if some of ``rows``, the argument ``name``, are in one of ``others``."""
    for kind, other in others.items():
        if common := shared_rows(rows, other, reads):
            raise ProblemError(
                f"{name}: {len(common)} of {len(rows)} rows are {kind} rows too; remove them"
            )


def passes(loader: Any) -> Iterator[Any]:
    """The batches of a stream's ``loader``, pass after pass without end.

    A pass ends with a smaller batch where its rows do not fill one, as an epoch does.
    """
    for number in count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(number)
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ProblemError("train_dataset: the stream has no examples; give it some")
