"""The levels' examples: their split, their checks, and what a checkpoint knows them by."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import pyarrow  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, Value
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from hyperopt_peft.errors import ProblemError


def split_dataset(
    train: Dataset, upper_fraction: float, seed: int, label: str | None = None
) -> tuple[Dataset, Dataset]:
    """The lower and the upper level's part of the training set, seeded.

    Stratified where ``label`` (by default the column ``label`` or ``labels``) holds classes: a
    ClassLabel, or whole numbers with at least three rows for each on average.

    Raises:
        ProblemError: the split would leave a level empty or without one of the classes, an
            example has none, or ``train`` has no such column.
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
    values = _classes(train, label or label_column(train))
    classes = values is not None
    rows = Dataset.from_dict({"row": range(len(train))})
    if values is not None:
        if None in values:
            raise ProblemError(
                f"{values.count(None)} of {len(train)} training examples have no label; remove them"
            )
        names = sorted(set(values))
        stratum = [names.index(value) for value in values]
        rows = rows.add_column("class", stratum).cast_column(
            "class", ClassLabel(names=[str(name) for name in names])
        )
    where = f"cannot give {upper_fraction:.0%} of {len(train)} training examples to the upper level"
    try:
        parts = rows.train_test_split(
            test_size=upper_fraction, seed=seed, stratify_by_column="class" if classes else None
        )
    except ValueError as error:
        raise ProblemError(f"{where}: {error}") from error
    if classes:
        counts = Counter(stratum)
        for part, level in ((parts["train"], "lower"), (parts["test"], "upper")):
            missing = sorted(set(counts) - set(part["class"][:]))
            if missing:
                raise ProblemError(
                    f"{where}: class {names[missing[0]]!r} has only {counts[missing[0]]} examples, "
                    f"and the {level} level would get none; change upper_fraction or the data"
                )
    return train.select(parts["train"]["row"][:]), train.select(parts["test"]["row"][:])


def data_of_levels(
    train: Any, upper: Any, evaluation: Any, args: Any, *, bilevel: bool
) -> tuple[Any, Any]:
    """The lower and the upper level's examples: ``train`` is split where ``upper`` is None.

    Raises:
        ProblemError: see `split_dataset`, `require_examples` and `require_apart`; ``upper`` is
            given without an upper level.
    """
    require_examples("train_dataset", train)
    if not bilevel:
        if upper is not None:
            raise ProblemError("upper_dataset: there is no upper level to give it to; leave it out")
        return train, None
    if upper is None:
        seed = args.seed if args.data_seed is None else args.data_seed
        train, upper = split_dataset(train, args.upper_fraction, seed)
        require_apart(None, upper, evaluation)
    else:
        require_examples("upper_dataset", upper, by_index=True)
        require_apart(train, upper, evaluation)
    return train, upper


def label_column(data: Dataset) -> str | None:
    """The column of ``data`` that Transformers' models and collators take for labels, if any."""
    return next((column for column in ("label", "labels") if column in data.column_names), None)


def _classes(data: Dataset, column: str | None) -> list[Any] | None:
    """The entries of ``column`` where they are classes."""
    feature = None if column is None else data.features[column]
    whole = isinstance(feature, Value) and "int" in feature.dtype
    if not whole and not isinstance(feature, ClassLabel):
        return None
    values: list[Any] = data.with_format(None)[column][:]
    # Whole numbers are classes where each of them is found again and again, ratings or counts not.
    return values if isinstance(feature, ClassLabel) or 3 * len(set(values)) <= len(data) else None


def require_examples(name: str, data: Any, *, by_index: bool = False) -> None:
    """Raise ProblemError where ``data``, the argument ``name``, is no data set or an empty one.

    ``by_index``: nor one that is read in order, or has no length.
    """
    if data is None:
        raise ProblemError(f"give the trainer a {name}")
    if isinstance(data, str | Mapping):
        raise ProblemError(
            f"{name} must be one data set, got a {type(data).__name__}; give one part of it, "
            f'such as {name}["train"]'
        )
    if by_index and (
        isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and has_length(data))
    ):
        raise ProblemError(
            f"{name} must have examples by index and a length, for batches that a resumed run "
            f"finds again; got a {type(data).__name__}"
        )
    if has_length(data) and len(data) == 0:
        raise ProblemError(f"{name} has no examples")


@contextmanager
def collating(name: str) -> Iterator[None]:
    """Make one ProblemError of what a data collator says of the examples of ``name``."""
    try:
        yield
    except ProblemError:
        raise
    except (TypeError, ValueError, LookupError) as error:
        raise ProblemError(
            f"the data collator makes no batch of examples of {name} ({error}); tokens of "
            "different length need a data_collator that pads, such as DataCollatorWithPadding, and "
            "columns of text must be removed"
        ) from error


def require_apart(lower: Any, upper: Any, evaluation: Any) -> None:
    """Raise ProblemError where two of the data sets are one, or the levels' share an example.

    Without ``lower``, ``upper`` is a part of the training set, which may be evaluated on, too.
    """
    for held_out in evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]:
        if _same(upper, held_out) or (lower is not None and shared(upper, held_out) == len(upper)):
            raise ProblemError(
                "eval_dataset is given as the upper level's data: then it is trained on, and "
                "measures nothing; give a part of the training set, or upper_fraction"
            )
    if isinstance(lower, Dataset) and isinstance(upper, Dataset) and not _columns(lower, upper):
        raise ProblemError(
            f"train_dataset and upper_dataset have no column in common: {lower.column_names} "
            f"and {upper.column_names}"
        )
    common = len(upper) if _same(upper, lower) else shared(upper, lower)
    if common:
        raise ProblemError(
            f"{common} of {len(upper)} examples of upper_dataset are in train_dataset too: the "
            "upper level must not judge on what the lower one fits; take them out of one"
        )


def _same(one: Any, other: Any) -> bool:
    fingerprint = getattr(one, "_fingerprint", None)
    return one is other or (
        fingerprint is not None and fingerprint == getattr(other, "_fingerprint", None)
    )


def _columns(one: Dataset, other: Dataset) -> list[str]:
    return [column for column in one.column_names if column in other.column_names]


def shared(data: Any, other: Any) -> int:
    """How many examples of ``data`` are in ``other`` too; 0 where that cannot be told."""
    if not (isinstance(data, Dataset) and isinstance(other, Dataset) and _columns(data, other)):
        return 0
    known = set(_digests(other, _columns(data, other)))
    return sum(digest in known for digest in _digests(data, _columns(data, other)))


#: Rows of a data set that a fingerprint reads at most, evenly spaced.
FINGERPRINT_ROWS = 100_000


def fingerprint(data: Any) -> str | int | None:
    """What a checkpoint knows ``data`` again by: the contents, the order and the number of rows.

    Of a `datasets.Dataset`, a list or a tuple it is a hash; of more than `FINGERPRINT_ROWS` rows
    those evenly spaced are read. Other data may cost or draw random numbers to read: of these it
    is the length, or None.
    """
    if not isinstance(data, Dataset | list | tuple):
        return len(data) if has_length(data) else None
    rows = range(0, len(data), max(1, len(data) // FINGERPRINT_ROWS))
    if not isinstance(data, Dataset):
        return str(Hasher.hash((len(data), [data[row] for row in rows])))
    digest = hashlib.sha256(f"{len(data)} {data.column_names}".encode())
    read = data if rows.step == 1 else data.select(rows)
    for table in read.with_format("arrow").iter(1000):
        plain = pyarrow.Table.from_arrays(table.columns, names=table.column_names)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


class Endless(IterableDataset[Any]):
    """The examples of a stream again and again, in one pass that never ends.

    The Trainer resumes within a pass by reading what came before, and does not know the passes
    of a stream without a length.

    Raises:
        ProblemError: a pass without examples.
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


def _digests(data: Dataset, columns: list[str]) -> Iterator[int]:
    """A hash of each row as it is stored, whatever format it is read in."""
    for table in data.select_columns(columns).with_format("arrow").iter(1000):
        yield from map(hash, map(repr, table.select(columns).to_pylist()))
