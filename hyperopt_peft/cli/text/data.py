"""Training and evaluation examples: local files or a hub data set, checked before any work."""

from __future__ import annotations

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
    """Which examples, and which of their columns."""

    _argument_group_name = "data"

    train_file: list[str] | None = HfArg(
        default=None, help="training examples: CSV, TSV, JSON, JSONL or Parquet files"
    )
    eval_file: list[str] | None = HfArg(
        default=None, help="evaluation examples, files likewise; never trained on"
    )
    dataset: str | None = HfArg(
        default=None, help="a hub data set (or a local folder of one), in place of train_file"
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
    max_length: int = HfArg(default=128, help="tokens an example; longer ones are cut")

    def __post_init__(self) -> None:
        if bool(self.train_file) == bool(self.dataset):
            raise ProblemError(
                "give the training examples as train_file or as dataset, one of them"
            )
        for name in ("dataset_config", "eval_split"):
            if getattr(self, name) and not self.dataset:
                raise ProblemError(f"{name} belongs to dataset, which is not given")
        if self.eval_file and self.eval_split:
            raise ProblemError("give eval_file or eval_split, not both")
        trained_on = {Path(path).resolve() for path in self.train_file or []}
        for path in self.eval_file or []:
            if Path(path).resolve() in trained_on:
                raise ProblemError(f"{path} is given as train_file and as eval_file")
        if self.dataset and self.eval_split == self.train_split:
            raise ProblemError(f"{self.eval_split} is given as train_split and as eval_split")
        if not 0 <= self.eval_fraction < 1:
            raise ProblemError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.max_length < 2:
            raise ProblemError(f"max_length must be at least 2, got {self.max_length}")

    def columns(self, task: str) -> list[str]:
        """The columns that ``task`` reads.

        Raises:
            ProblemError: seq2seq without a target, or more texts than the task has.
        """
        texts, label = self.text_columns, self.label_column
        limit = 2 if task in ("text-classification", "regression") else 1
        if task == "token-classification":
            return [self.tokens_column, label]
        if len(texts) > limit:
            raise ProblemError(f"text_columns: {task} takes {limit}, got {', '.join(texts)}")
        if task in ("text-classification", "regression"):
            return [*texts, label]
        if task == "seq2seq" and self.target_column is None:
            raise ProblemError("seq2seq needs target_column, the column with the text to produce")
        return [*texts, *([self.target_column] if self.target_column else [])]


def load(args: DataArguments, task: str) -> tuple[Dataset, Dataset | None]:
    """The training examples, and the evaluation's where they are given apart.

    Raises:
        ProblemError: a missing, empty or unreadable file, a data set that is not found, a
            missing column, one that is named twice, or an empty cell.
    """
    columns = args.columns(task)
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ProblemError(
            f"the column {twice[0]!r} is named twice; texts, target and label are different columns"
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


def read_files(paths: Sequence[str], option: str) -> Dataset:
    """The rows of all ``paths``, one after the other.

    Raises:
        ProblemError: a file that is missing, empty, of an unknown kind or damaged.
    """
    return _rows([_read_file(Path(path), option) for path in paths], ", ".join(paths))


def _read_file(path: Path, option: str) -> Dataset:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ProblemError(f"{option}: {path} is none of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ProblemError(f"{option}: there is no file {path}")
    if path.stat().st_size == 0:
        raise ProblemError(f"{option}: {path} is empty")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if kind == "csv":
        _require_line_ends(path, option)
        # "None" and "NA" are classes and words, not empty cells.
        options |= {"keep_default_na": False, "na_values": [""]}
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the error below is the one line
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
        raise ProblemError(f"{option}: {path} is empty: it has no rows")
    return data


def _require_line_ends(path: Path, option: str) -> None:
    """Raise ProblemError for a carriage return that would cut a row in two.

    Outside of quotes it ends a row as a line feed does; a file may have the one or the other.
    """
    row, quoted = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if b"\0" in line:  # not UTF-8, which reading it says
                return
            parts = line.removesuffix(b"\n").removesuffix(b"\r").split(b'"')
            open_parts = parts[quoted::2]
            row += not quoted
            if any(b"\r" in part for part in open_parts) and (number or line.endswith(b"\n")):
                raise ProblemError(
                    f"{option}: {path}: a carriage return within row {row - 1} ends the row there; "
                    "put quotes around the text, or take the carriage return out"
                )
            quoted ^= len(parts) % 2 == 0


def _rows(parts: list[Dataset], names: str) -> Dataset:
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise ProblemError(f"the columns of {names} differ: {error}") from error


def read_split(args: DataArguments, split: str) -> Dataset:
    """One part of the hub data set.

    Raises:
        ProblemError: it cannot be found or read, or has no rows.
    """
    try:
        data = load_dataset(args.dataset, args.dataset_config, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        raise ProblemError(
            f"cannot load {split} of the data set {args.dataset}: {error}"
        ) from error
    if not len(data):
        raise ProblemError(f"{split} of the data set {args.dataset} is empty")
    return data


def require_columns(data: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise ProblemError where ``data`` lacks a column, or has an empty cell in one."""
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
                f"row {row + 1}; fill it or take the rows out"
            )


def kind_of(feature: Any) -> str:
    """What a column holds: ``"class"``, a type such as ``"int64"``, ``"list of …"`` or ``"json"``.

    The last is what `datasets` makes of values of several types in a JSON file.
    """
    if isinstance(feature, ClassLabel):
        return "class"
    inner = getattr(feature, "feature", None)
    return f"list of {kind_of(inner)}" if inner is not None else _type_of(feature)


def _type_of(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__.lower()))


def hold_out(train: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """The rest, and ``fraction`` of ``train`` for evaluation; stratified where labels are classes.

    Raises:
        ProblemError: too few examples.
    """
    classes = isinstance(train.features["labels"], ClassLabel)
    try:
        parts = train.train_test_split(
            test_size=fraction, seed=0, stratify_by_column="labels" if classes else None
        )
    except ValueError as error:
        raise ProblemError(
            f"cannot hold out eval_fraction={fraction} of {len(train)} examples: {error}"
        ) from error
    return parts["train"], parts["test"]


def require_repeated(train: Dataset, held_out: bool) -> None:
    """Raise ProblemError for a class with fewer examples than there are parts to divide them.

    Args:
        train: encoded examples whose ``labels`` are a ClassLabel.
        held_out: whether evaluation takes its part of them.
    """
    parts = ["the lower level", "the upper level", *(["the evaluation"] if held_out else [])]
    feature = train.features["labels"]
    counts = Counter(train["labels"][:])
    if len(counts) == 1:
        raise ProblemError(f"all training examples have the label {feature.names[min(counts)]!r}")
    rarest = min(counts, key=lambda label: (counts[label], label))
    if counts[rarest] < len(parts):
        times = "once" if counts[rarest] == 1 else f"{counts[rarest]} times"
        raise ProblemError(
            f"the label {feature.names[rarest]!r} occurs {times} in the training examples, and "
            f"{', '.join(parts)} need one each; add examples or take the label out"
        )
