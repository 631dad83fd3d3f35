"""Training and evaluation examples from local files or a data set of the hub, and checks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import logging
from transformers.hf_argparser import HfArg

from hyperopt_peft.errors import ProblemError, did_you_mean

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# What pyarrow and datasets say of values of several types, before datasets had a type for them.
MIXED = re.compile("Conversion failed for column|Failed to convert pandas DataFrame")


@dataclass
class DataArguments:
    """The examples and their columns."""

    _argument_group_name = "data"

    train_file: list[str] | None = HfArg(
        default=None, help="training examples: CSV, TSV, JSON, JSONL or Parquet files"
    )
    eval_file: list[str] | None = HfArg(
        default=None, help="evaluation examples: files as for train_file; never trained on"
    )
    dataset: str | None = HfArg(
        default=None, help="a data set of the hub (or a local folder), instead of train_file"
    )
    dataset_config: str | None = HfArg(default=None, help="the data set's configuration")
    train_split: str = HfArg(default="train", help="the data set's part to train on")
    eval_split: str | None = HfArg(default=None, help="the data set's part to evaluate on")
    eval_fraction: float = HfArg(
        default=0.1,
        help="share of the training examples that is held out for evaluation where neither "
        "eval_file nor eval_split is given, the same for every seed; 0 for no evaluation",
    )
    text_columns: list[str] = HfArg(
        default_factory=lambda: ["text"],
        help="the column with the text; two for pairs of texts; the source for seq2seq; the "
        "prompt, or all of the text, for causal-lm",
    )
    label_column: str = HfArg(
        default="label",
        help="the column with the class, the number (regression) or the list of the words' tags "
        "(token-classification)",
    )
    tokens_column: str = HfArg(
        default="tokens", help="the column with the list of words, for token-classification"
    )
    target_column: str | None = HfArg(
        default=None,
        help="the column with the text to produce, for seq2seq; for causal-lm the answer, and the "
        "prompt is then left out of the loss",
    )
    weight_column: str | None = HfArg(
        default=None,
        help="the column with the weight of each training example's loss, such as that which "
        "attribute writes; not of evaluation examples",
    )
    max_length: int = HfArg(default=128, help="tokens an example; longer ones are cut")

    def __post_init__(self) -> None:
        if bool(self.train_file) == bool(self.dataset):
            raise ProblemError(
                "train_file: give the training examples as train_file or as dataset, not as both"
            )
        for name in ("dataset_config", "eval_split"):
            if getattr(self, name) and not self.dataset:
                raise ProblemError(
                    f"{name}: there is no dataset; give dataset, or leave {name} out"
                )
        if self.eval_file and self.eval_split:
            raise ProblemError("eval_split: eval_file is given too; leave one of them out")
        trained_on = {Path(path).resolve() for path in self.train_file or []}
        for path in self.eval_file or []:
            if Path(path).resolve() in trained_on:
                raise ProblemError(
                    f"eval_file: {path} is given as train_file too; give another file"
                )
        if self.dataset and self.eval_split == self.train_split:
            raise ProblemError(
                f"eval_split: {self.eval_split} is given as train_split too; give another part"
            )
        if not 0 <= self.eval_fraction < 1:
            raise ProblemError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.max_length < 2:
            raise ProblemError(f"max_length must be at least 2, got {self.max_length}")

    def columns(self, task: str) -> list[str]:
        """The columns that ``task`` reads.

        Raises:
            ProblemError: seq2seq without a target, or more text columns than the task reads.
        """
        texts, label = self.text_columns, self.label_column
        limit = 2 if task in ("text-classification", "regression") else 1
        if task == "token-classification":
            return [self.tokens_column, label]
        if len(texts) > limit:
            raise ProblemError(
                f"text_columns: {task} reads {limit}, got {', '.join(texts)}; leave some out"
            )
        if task in ("text-classification", "regression"):
            return [*texts, label]
        if task == "seq2seq" and self.target_column is None:
            raise ProblemError(
                "target_column: seq2seq needs one; name the column with the text to produce"
            )
        return [*texts, *([self.target_column] if self.target_column else [])]


def load(args: DataArguments, task: str) -> tuple[Dataset, Dataset | None]:
    """The training examples, and the evaluation examples unless these are to be held out.

    Raises:
        ProblemError: a missing, empty or unreadable file, an unknown data set, a missing column,
            one that is named twice, or an empty cell.
    """
    columns = args.columns(task)
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ProblemError(
            f"the column {twice[0]!r} is named twice; name different columns for texts, target and "
            "label"
        )
    if args.train_file:
        train = read_files(args.train_file, "train_file")
    else:
        train = read_split(args, args.train_split)
    evaluation = None
    if args.eval_file:
        evaluation = read_files(args.eval_file, "eval_file")
    elif args.eval_split:
        evaluation = read_split(args, args.eval_split)
    require_columns(train, columns, "the training examples")
    if evaluation is not None:
        require_columns(evaluation, columns, "the evaluation examples")
    return train, evaluation


def weights_of(train: Dataset, column: str) -> list[float]:
    """The weights in ``column``, finite numbers from 0.

    Raises:
        ProblemError: no such column, an empty cell, or another value.
    """
    require_columns(train, [column], "the training examples")
    values: list[Any] = train[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ProblemError(
                f"weight_column: row {row + 1} of {column!r} is {value!r}; give numbers from 0"
            )
    return [float(value) for value in values]


def read_files(paths: Sequence[str], option: str) -> Dataset:
    """The rows of all ``paths``, in order.

    Raises:
        ProblemError: a file that is missing, empty, damaged or of an unknown format.
    """
    parts = [_read_file(Path(path), option) for path in paths]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise ProblemError(
            f"{option}: the columns of {', '.join(paths)} differ ({error}); give all files the same"
        ) from error


def _read_file(path: Path, option: str) -> Dataset:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ProblemError(f"{option}: {path} is not of a known format; use {', '.join(FORMATS)}")
    if not path.is_file():
        raise ProblemError(f"{option}: there is no file {path}; correct the path")
    if path.stat().st_size == 0:
        raise ProblemError(f"{option}: {path} is empty; give another file")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if kind == "csv":
        _require_line_ends(path, option)
        # "None" and "NA" may be classes or words.
        options |= {"keep_default_na": False, "na_values": [""]}
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the exception says it in one line
    try:
        data = load_dataset(kind, data_files=str(path), **options).get("train")
    except (DatasetsError, ValueError, OSError) as error:
        if "corresponds to no data" not in str(error):
            reason = error.__cause__ or error
            hint = ""
            if isinstance(reason, UnicodeDecodeError):
                hint = "; save it as UTF-8"
            elif MIXED.search(str(reason)):
                hint = "; make all values of a column of one type"
            raise ProblemError(f"{option}: cannot read {path}: {reason}{hint}") from error
        data = None
    finally:
        logging.set_verbosity(level)
    if not data:
        raise ProblemError(f"{option}: {path} is empty: it has no rows; give another file")
    return data


def _require_line_ends(path: Path, option: str) -> None:
    """Raise ProblemError for a carriage return that would split a row.

    Outside of quotes the reader ends a row at a carriage return, even if the file's line ends are
    line feeds.
    """
    row, quoted = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if b"\0" in line:  # not UTF-8, which the reader refuses
                return
            parts = line.removesuffix(b"\n").removesuffix(b"\r").split(b'"')
            open_parts = parts[quoted::2]
            row += not quoted
            if any(b"\r" in part for part in open_parts) and (number or line.endswith(b"\n")):
                raise ProblemError(
                    f"{option}: {path}: a carriage return within row {row - 1} ends the row there; "
                    "put quotes around the text, or remove the carriage return"
                )
            quoted ^= len(parts) % 2 == 0


def read_split(args: DataArguments, split: str) -> Dataset:
    """The part ``split`` of the data set.

    Raises:
        ProblemError: the part does not exist, cannot be read, or has no rows.
    """
    try:
        data = load_dataset(args.dataset, args.dataset_config, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        raise ProblemError(
            f"dataset: {split} of {args.dataset} cannot be loaded ({error}); correct the name"
        ) from error
    if not len(data):
        raise ProblemError(f"dataset: {split} of {args.dataset} is empty; give another part")
    return data


def require_columns(data: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise ProblemError if ``data`` lacks one of ``columns`` or has an empty cell in one."""
    for column in columns:
        if column not in data.column_names:
            separated = any(mark in data.column_names[0] for mark in ";|\t")
            raise ProblemError(
                f"{where} have no column {column!r}{did_you_mean(column, data.column_names)}"
                + ("; in a CSV file commas separate the columns, in TSV tabs" if separated else "")
            )
        if missing := data.data.column(column).null_count:
            row = data[column][:].index(None)
            raise ProblemError(
                f"{where}: column {column!r} is empty in {missing} of {len(data)} rows, first in "
                f"row {row + 1}; fill the cells or remove the rows"
            )


def kind_of(feature: Any) -> str:
    """The kind of a column: ``"class"``, a type such as ``"int64"``, ``"list of …"`` or ``"json"``.

    `datasets` gives values of several types in a JSON file the type ``"json"``.
    """
    if isinstance(feature, ClassLabel):
        return "class"
    if (inner := getattr(feature, "feature", None)) is not None:
        return f"list of {kind_of(inner)}"
    return str(getattr(feature, "dtype", type(feature).__name__.lower()))


def hold_out(train: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """The training and the evaluation part of ``train``, stratified if the labels are classes.

    Raises:
        ProblemError: too few examples for ``fraction``.
    """
    classes = isinstance(train.features["labels"], ClassLabel)
    try:
        parts = train.train_test_split(
            test_size=fraction, seed=0, stratify_by_column="labels" if classes else None
        )
    except ValueError as error:
        raise ProblemError(
            f"eval_fraction={fraction}: too few of {len(train)} examples to hold out ({error}); "
            "raise eval_fraction or give eval_file"
        ) from error
    return parts["train"], parts["test"]


def require_repeated(train: Dataset, held_out: bool) -> None:
    """Raise ProblemError for a class with fewer examples than the number of parts of the data.

    Args:
        train: encoded examples whose ``labels`` are a ClassLabel.
        held_out: whether the evaluation examples are a part of them.
    """
    parts = ["the lower level", "the upper level", *(["the evaluation"] if held_out else [])]
    feature = train.features["labels"]
    counts = Counter(train["labels"][:])
    if len(counts) == 1:
        raise ProblemError(
            f"all training examples have the label {feature.names[min(counts)]!r}; add others"
        )
    rarest = min(counts, key=lambda label: (counts[label], label))
    if counts[rarest] < len(parts):
        times = "once" if counts[rarest] == 1 else f"{counts[rarest]} times"
        raise ProblemError(
            f"the label {feature.names[rarest]!r} occurs {times} in the training examples, and "
            f"{', '.join(parts)} need one each; add examples or remove the label's rows"
        )
