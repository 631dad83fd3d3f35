"""Training and evaluation examples: read from files or a data set of the hub, and checked."""

from __future__ import annotations

import atexit
import csv
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import logging

from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.trainer.splits import hold_out
from hyperopt_peft.utils.validation import option

logger = logging.get_logger(__name__)
FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TRAIN, UPPER = "the training examples", "the upper level's examples"
EVALUATION = "the evaluation examples"
#: The column with the file of a row.
SOURCE = "source"


@dataclass
class ExampleData:
    """The training and the evaluation examples, in files or in a data set of the hub."""

    _argument_group_name = "data"

    train_file: list[str] | None = option(None, help="CSV, TSV, JSON, JSONL or Parquet")
    dataset: str | None = option(None, help="a data set of the hub, or a folder")
    dataset_config: str | None = option(None, help="the data set's configuration")
    train_split: str = option("train", help="the data set's part to train on")
    upper_file: list[str] | None = option(None, help="examples of the upper level")
    eval_file: list[str] | None = option(None, help="files that are never trained on")
    eval_split: str | None = option(None, help="the data set's part to evaluate on")
    eval_fraction: float = option(0.1, help="share to hold out if there is no eval_file")

    def __post_init__(self) -> None:
        if bool(self.train_file) == bool(self.dataset):
            raise ProblemError("train_file: give either train_file or dataset")
        if self.eval_split and (self.eval_file or not self.dataset):
            raise ProblemError("eval_split: needs a dataset and no eval_file; leave one out")

    def read(self, columns: Collection[str] = ()) -> tuple[Dataset, Dataset | None, Dataset | None]:
        """The examples for training, with `SOURCE` if asked, for the upper level and evaluation."""
        train = self._part("train_file", "train_split", by_source=SOURCE in columns)
        return train, self._part("upper_file"), self._part("eval_file", "eval_split")

    def _part(self, files: str, split: str = "", *, by_source: bool = False) -> Any:
        if paths := getattr(self, files):
            return read_files(paths, files, by_source=by_source)
        if part := getattr(self, split, None):
            name = f"{part} of {self.dataset}"
            return _load(split, name, self.dataset, self.dataset_config, split=part)
        return None


@dataclass
class DataArguments(ExampleData):
    """The examples and their columns."""

    text_columns: list[str] = option(
        default_factory=lambda: ["text"], help="column with the text or prompt, or two for pairs"
    )
    label_column: str = option("label", help="column with classes, numbers or lists of tags")
    tokens_column: str = option("tokens", help="for token-classification: lists of words")
    target_column: str | None = option(
        None, help="the text to produce, or after a causal-lm prompt"
    )
    corrections: list[str] | None = option(None, help="suspects.csv with corrected labels")
    max_length: int = option(128, help="tokens in an example; longer ones are cut")

    def columns(self, task: str) -> list[str]:
        """The columns that ``task`` reads."""
        pairs = task in ("text-classification", "regression")
        if task == "seq2seq" and self.target_column is None:
            raise ProblemError("target_column: seq2seq needs one; name the column of the targets")
        if task == "token-classification":
            return [self.tokens_column, self.label_column]
        other = self.label_column if pairs else self.target_column
        columns = [*self.text_columns, *filter(None, [other])]
        if len(self.text_columns) > 1 + pairs:
            got = ", ".join(self.text_columns)
            raise ProblemError(f"text_columns: {task} reads {1 + pairs}, got {got}; leave some out")
        return columns


def read_files(paths: Sequence[str], option: str, *, by_source: bool = False) -> Dataset:
    """The rows of the files in ``option``; ``by_source`` several files get a column `SOURCE`."""
    tables = [_read_file(path, option) for path in paths]
    names = {name for rows in tables for name in rows.column_names}
    for path, rows in zip(paths, tables):
        if lacking := ", ".join(sorted(names.difference(rows.column_names))):
            logger.warning(f"{option}: {path} has no column {lacking}; it is empty there")
    if by_source and len(paths) > 1 and SOURCE not in tables[0].column_names:
        tables = [rows.add_column(SOURCE, [x] * len(rows)) for x, rows in zip(paths, tables)]
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise ProblemError(f"{option}: give all files the same columns: {error}") from error


def _read_file(name: str, option: str) -> Dataset:
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ProblemError(f"{option}: {name!r} has no known format; use {', '.join(FORMATS)}")
    if not path.is_file():
        raise ProblemError(f"{option}: there is no file {path}; correct the path")
    with path.open("rb") as file:
        if file.read(4) in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):  # a zip archive, an old Excel's
            raise ProblemError(f"{option}: {path} is an Excel or zip file; export it as CSV")
    options: dict[str, Any] = {"data_files": str(path), "cache_dir": cache_folder()}
    if FORMATS[suffix] == "csv":
        # "None" and "NA" may be classes or words. A first row that is longer than the header
        # would otherwise shift all columns by one.
        options |= {"keep_default_na": False, "na_values": [""], "index_col": False}
        options["sep"] = sep = "\t" if suffix == ".tsv" else ","
        _require_table(path, option, sep)
    return _load(option, str(path), FORMATS[suffix], split="train", **options)


def _require_table(path: Path, option: str, mark: str) -> None:
    """Raise ProblemError if header or rows do not have one cell a column, by their marks."""
    line, where, sign = 1, f"{option}: {path}", "a comma" if mark == "," else "a tab"
    csv.field_size_limit(2**31 - 1)  # of a text
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=mark, strict=True)
        try:
            names = next(filter(None, rows), [""])
            line = rows.line_num + 1  # where the next row begins
            other = next((each for each in ";\t|," if each in names[0]), None)
            if len(names) == 1 and other:
                raise ProblemError(f"{where} has {other!r} between its columns; use {mark!r}")
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                raise ProblemError(f"{where} has two columns {twice!r}; rename or remove one")
            for row in rows:
                if any(row[len(names) :]):
                    text = f"{len(row)} cells for {len(names)} columns; quote texts with {sign}"
                    raise ProblemError(f"{where}: line {line} has {text}")
                line = rows.line_num + 1
        except csv.Error as error:
            text = "a quote that is not closed, or not doubled within a text"
            raise ProblemError(f"{where}: line {line} has {text}; correct it") from error


def _load(option: str, name: str, *source: Any, **options: Any) -> Dataset:
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the exception says it in one line
    empty = f"{option}: {name} has no rows; give another"
    try:
        rows = load_dataset(*source, **options)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        cause = error.__cause__ or error
        nothing = any(text in f"{error} {cause}" for text in ("to no data", "No columns to parse"))
        if isinstance(cause, StopIteration) or nothing:
            raise ProblemError(empty) from error
        wrong = f"cannot be read: {cause}; correct the name, or have one type in each column"
        if isinstance(cause, UnicodeDecodeError):
            wrong = "is not encoded as UTF-8; save it as UTF-8 (in a spreadsheet: CSV UTF-8)"
        raise ProblemError(f"{option}: {name} {wrong}") from error
    finally:
        logging.set_verbosity(level)
    if not len(rows):
        raise ProblemError(empty)
    return rows


@cache
def cache_folder() -> str:
    """The folder for the tables of `datasets`, which is removed at the end of the process."""
    folder = mkdtemp(prefix="hyperopt-peft-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def require_columns(data: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise ProblemError if ``data`` lacks one of ``columns`` or has an empty cell in one."""
    if len({*columns}) < len(columns):
        raise ProblemError(f"{where}: one of {', '.join(columns)} is given twice; name another")
    for column in columns:
        if column not in data.column_names:
            near = did_you_mean(column, data.column_names)
            if column in ("True", "False"):
                near += "; YAML needs quotes around yes and no"
            raise ProblemError(f"{where} have no column {column!r}{near}")
        if missing := data.data.column(column).null_count:
            raise ProblemError(
                f"{where}: column {column!r} is empty in {missing} of {len(data)} rows, first in "
                f"row {data[column][:].index(None)} (from 0); fill them or remove the rows, or put "
                "texts with line breaks into quotes"
            )


def held_out(train: Dataset, fraction: float, besides: Collection[str]) -> tuple[Dataset, Dataset]:
    """The training and the evaluation part of ``train``, stratified if the labels are classes.

    Copies of a row, but for the columns ``besides``, are in one part.
    """
    label, reads = train.features.get("labels"), {*train.column_names} - {*besides}
    is_class = isinstance(label, ClassLabel)
    classes, named = (train["labels"][:], label.int2str) if is_class else ((), str)
    parts = hold_out(train, fraction, 0, "eval_fraction", classes, reads, named)
    return train.select(parts[0]), train.select(parts[1])
