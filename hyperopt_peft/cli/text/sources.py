"""The examples of several sources: files of each, or a column that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import yaml
from datasets import Dataset
from transformers.hf_argparser import HfArg

from hyperopt_peft.cli.text.data import DataArguments, TrainingData, join, read_files
from hyperopt_peft.errors import ProblemError

#: The column with the name of each training example's source file.
ORIGIN = "mix_source"


@dataclass
class Sources(TrainingData):
    """The examples of the sources.

    Attributes:
        files: the paths of each source's files; empty if a column names the sources.
        rows: the number of rows of each file, by source, once they are read.
    """

    sources: str | None = HfArg(
        default=None,
        help="the files of each source, by name, as a mapping: {wiki: a.jsonl, code: [b.jsonl]}; "
        "train_file and dataset are then not read",
    )
    source_column: str | None = HfArg(
        default=None, help="the column of train_file or dataset that names each example's source"
    )

    def __post_init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.rows: dict[str, dict[str, int]] = {}
        super().__post_init__()

    def require_data(self) -> None:
        """Raise ProblemError unless there are files of each source, or data with a column."""
        if bool(self.sources) == bool(self.source_column):
            raise ProblemError("sources: give either the files of each source, or a source_column")
        if not self.sources:
            super().require_data()
            return
        try:
            files = yaml.safe_load(self.sources)
            self.files = {
                str(k): [v] if isinstance(v, str) else [*map(str, v)] for k, v in files.items()
            }
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            raise ProblemError(
                f"sources: must map names to files, as in {{wiki: a.jsonl}}, got {self.sources!r}"
            ) from error

    @property
    def column(self) -> str:
        """The column that names the source of a row of `read_train`."""
        return self.source_column or ORIGIN

    def read_train(self, read: Callable[[Dataset, str], Dataset] | None = None) -> Dataset:
        """The examples of all sources, with the source's name in `column`.

        ``read`` maps the rows of a file, and its path, to the rows to join.
        """
        if not self.files:
            return super().read_train()
        tables, names = [], []
        for name, paths in self.files.items():
            for path in paths:
                rows = read_files([path], "sources")
                tables.append(read(rows, path) if read else rows)
                names += [name] * len(rows)
                self.rows.setdefault(name, {})[path] = len(rows)
        return join(tables, "sources").add_column(ORIGIN, names)


@dataclass
class SourceArguments(Sources, DataArguments):
    """The examples of the sources, and their columns."""

    # No options here: mix has a test_file, and learns weights.
    eval_file: list[str] | None = field(default=None, init=False)
    eval_split: str | None = field(default=None, init=False)
    eval_fraction: float = field(default=0.0, init=False)
    weight_column: str | None = field(default=None, init=False)
