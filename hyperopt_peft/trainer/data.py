"""Splits and checks the levels' data sets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from inspect import signature
from itertools import count
from typing import Any

import numpy as np
from accelerate.utils import send_to_device
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from torch.nn import Module
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.models import base_model
from hyperopt_peft.utils.random_state import RandomState, replay

logger = logging.get_logger(__name__)
#: Columns that a Trainer keeps for every model.
LABELS = ("label", "labels", "label_ids")
#: The columns of `reads_of`, or None for all.
Reads = Set[str] | None
#: Names in the dict of evaluation sets that a parent trainer prepares.
EVALUATION, UPPER = "eval", "upper_dataset"


def split_dataset(
    train: Dataset, upper_fraction: float, seed: int, label: str | None = None, reads: Reads = None
) -> tuple[Dataset, Dataset]:
    """Split the training set into the lower and the upper level's rows, by ``seed``.

    The split is stratified if the column ``label`` (by default ``label`` or ``labels``) holds
    classes: a ClassLabel, or integers that each occur at least three times on average. All copies
    of a row are in one level.

    Args:
        upper_fraction: the upper level's share of the different rows, in (0, 1).
        label: the column of the classes.
        reads: the columns in which copies are equal; by default all.

    Raises:
        ProblemError: a level would be empty or lack a class, an example has no class, or ``train``
            has no column ``label``.

    Example:
        >>> train = Dataset.from_dict({"x": range(20), "label": [0, 1] * 10})
        >>> lower, upper = split_dataset(train, 0.2, seed=0)
        >>> len(lower), sorted(upper["label"])
        (16, [0, 0, 1, 1])
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
    values = classes_of(train, label or label_column(train)) or []
    if None in values:
        raise ProblemError(
            f"{values.count(None)} of {len(train)} training examples have no label; remove them"
        )
    parts = hold_out(train, upper_fraction, seed, "upper_fraction", values, reads)
    for level, rows in zip(("lower", "upper"), parts, strict=True):
        if missing := {*values} - {values[row] for row in rows if values}:
            name = min(missing)
            raise ProblemError(
                f"upper_fraction: class {name!r} has only {values.count(name)} examples, and the "
                f"{level} level would get none; change upper_fraction or the data"
            )
    lower, upper = map(train.select, parts)
    return lower, upper


def hold_out(
    rows: Dataset,
    fraction: float,
    seed: int,
    argument: str,
    classes: Sequence[Any] = (),
    reads: Reads = None,
    named: Callable[[Any], str] = str,
) -> tuple[list[int], list[int]]:
    """The numbers of the other rows, and of a ``fraction`` of the different ``rows``.

    All copies of a row, equal in the columns ``reads``, are on one side. Each of ``classes``, one a
    row and ``named`` in messages, has about equal shares of both sides.

    Raises:
        ProblemError: the split is impossible; the message begins with ``argument``.

    Example:
        >>> rows = Dataset.from_dict({"x": [0, 1, 2, 3, 0]})
        >>> rest, held_out = hold_out(rows, 0.5, 0, "fraction")
        >>> (0 in rest) == (4 in rest), sorted([*rest, *held_out])
        (True, [0, 1, 2, 3, 4])
    """
    copies, names = defaultdict[int, list[int]](list), sorted({*classes})
    for row, first in enumerate(firsts(rows, reads)):
        copies[first].append(row)
    numbers = [names.index(classes[first]) if names else 0 for first in copies]
    impossible = f"{argument}: cannot hold out {fraction:.0%} of {len(copies)} different rows"
    if names and (rare := [names[k] for k, count in Counter(numbers).items() if count < 2]):
        raise ProblemError(
            f"{impossible}: the class {named(rare[0])!r} has 1 row, and both parts need one; add "
            "rows or remove the row"
        )
    labels = ClassLabel(names=[*map(str, names)] or ["any"])
    features = Features({"row": Value("int64"), "class": labels})  # a cast would show a bar
    table = Dataset.from_dict({"row": [*copies], "class": numbers}, features=features)
    options = {"seed": seed, "stratify_by_column": "class" if names else None}
    try:
        parts = table.train_test_split(test_size=fraction, **options)
    except ValueError as error:
        raise ProblemError(f"{impossible}: {error}") from error
    rest, held_out = (
        [*part["row"], *(k for row in part["row"] for k in copies[row][1:])]
        for part in (parts["train"], parts["test"])
    )
    return rest, held_out


def folds_of(groups: Sequence[int], count: int, seed: int = 0) -> list[list[int]]:
    """The places of ``groups`` in each of ``count`` random folds, for cross-validation.

    Equal groups, such as `firsts` has for copies of a row, are in one fold. Groups that all differ
    have the folds of ``sklearn.model_selection.KFold(count, shuffle=True, random_state=seed)``.

    Example:
        >>> folds_of([0, 1, 2, 3, 0], 2)
        [[2, 3], [0, 1, 4]]
    """
    order = np.random.RandomState(seed).permutation(np.unique(groups))
    return [np.flatnonzero(np.isin(groups, x)).tolist() for x in np.array_split(order, count)]


def data_of_levels(train: Any, upper: Any, args: Any, bilevel: bool, reads: Reads) -> Any:
    """The data of the lower and the upper level; ``train`` is split if ``upper`` is None."""
    require_examples("train_dataset", train)
    if not bilevel and upper is not None:
        raise ProblemError("upper_dataset: there is no upper level; leave upper_dataset out")
    if bilevel and upper is None:
        seed = args.seed if args.data_seed is None else args.data_seed
        train, upper = split_dataset(train, args.upper_fraction, seed, reads=reads)
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


def label_column(data: Dataset) -> str | None:
    """The column of ``data`` that models and collators of Transformers read as labels, if any."""
    return next((column for column in ("label", "labels") if column in data.column_names), None)


def classes_of(data: Dataset, column: str | None) -> list[Any] | None:
    """The entries of ``column`` if they are classes (see `split_dataset`), else None."""
    feature = None if column is None else data.features[column]
    integer = isinstance(feature, Value) and "int" in feature.dtype
    if not integer and not isinstance(feature, ClassLabel):
        return None
    values: list[Any] = data.with_format(None)[column][:]
    # Many different integers may be ratings or counts.
    return values if isinstance(feature, ClassLabel) or 3 * len(set(values)) <= len(data) else None


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
    one, two = ({n for n, x in d.features.items() if not _is_number(x)} for d in (lower, upper))
    if other := sorted(one ^ two):
        raise ProblemError(
            f"upper_dataset: has other columns than train_dataset ({', '.join(other)}); give both "
            "the same layout"
        )


def _is_number(kind: Any) -> bool:
    return isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "string" not in kind.dtype)


def reads_of(model: Any, args: Any) -> set[str] | None:
    """The columns that a Trainer with ``args`` keeps for ``model``; None if it keeps all."""
    if not args.remove_unused_columns:
        return None
    inputs = signature(base_model(model).forward).parameters if isinstance(model, Module) else ()
    return {*inputs, *LABELS, *(args.label_names or ())}


def columns_read(one: Dataset, other: Dataset, reads: Reads = None) -> list[str]:
    """The columns of both that are in ``reads``; without it all.

    If they are labels alone, as beside texts that a parent trainer prepares, also those of texts.
    """
    common = [column for column in one.column_names if column in other.column_names]
    read = [column for column in common if reads is None or column in reads]
    texts = [column for column in common if not _is_number(one.features[column])]
    return read if {*read} - {*LABELS} else [*texts, *read] if texts else common


def require_unseen(name: str, rows: Any, reads: Reads = None, **others: Any) -> None:
    """Raise ProblemError if some of ``rows``, the argument ``name``, are in one of ``others``."""
    for kind, other in others.items():
        if common := shared_rows(rows, other, reads):
            raise ProblemError(
                f"{name}: {len(common)} of {len(rows)} rows are {kind} rows too; remove them"
            )


def shared_rows(data: Any, other: Any, reads: Reads = None) -> list[int]:
    """The indices of the examples of ``data`` that are also in ``other``; none if unknown.

    Examples are equal if they are in `columns_read`.
    """
    if data is other:
        return list(range(len(data)))
    tables = isinstance(data, Dataset) and isinstance(other, Dataset)
    if not (tables and (columns := columns_read(data, other, reads))):
        return []
    others = {*digests(other, columns)}
    return [row for row, digest in enumerate(digests(data, columns)) if digest in others]


def firsts(data: Dataset, reads: Reads = None) -> list[int]:
    """The number of the first row that is equal to each row; see `shared_rows`."""
    first, hashes = dict[int, int](), digests(data, columns_read(data, data, reads))
    return [first.setdefault(digest, row) for row, digest in enumerate(hashes)]


class Endless(IterableDataset[Any]):
    """A stream of unknown length, repeated without end as one epoch.

    Within an epoch the Trainer can resume: it reads the earlier examples again.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)
            row = None
            for row in self.stream:
                yield row
            if row is None:
                raise ProblemError("train_dataset: the stream has no examples; give it some")


def digests(data: Dataset, columns: list[str]) -> Iterator[int]:
    """A hash of each stored row, independent of the format of ``data``."""
    for table in data.select_columns(columns).with_format("arrow").iter(1000):
        yield from map(hash, map(repr, table.select(columns).to_pylist()))
