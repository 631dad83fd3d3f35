"""Encoding of rows with texts as token numbers and labels, one function for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Value

from hyperopt_peft.cli.text.data import DataArguments, kind_of
from hyperopt_peft.cli.text.tasks import IGNORED, TASKS
from hyperopt_peft.errors import ProblemError, did_you_mean

Rows = Mapping[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of one task.

    Attributes:
        task: the name of the task.
        args: the columns and the maximum length.
        tokenizer: the tokenizer of the model.
        names: the classes in the order of their numbers; empty if labels are no classes.
    """

    task: str
    args: DataArguments
    tokenizer: Any
    names: tuple[str, ...] = ()

    def encode(self, data: Dataset, where: str) -> Dataset:
        """The arguments of the model's forward, with ``labels``.

        Args:
            data: rows with the columns of the task.
            where: the name of the data in errors.

        Raises:
            ProblemError: a column of the wrong kind, an unknown class, different numbers of words
                and tags, or a row without a label to learn.
        """
        self._require_kinds(data, where)
        functions: dict[str, Callable[[Rows, list[int]], Rows]] = {
            "text-classification": self._classes,
            "regression": self._numbers,
            "token-classification": self._tags,
            "causal-lm": self._language,
            "seq2seq": self._pairs,
        }
        if self.names:
            data = _named(data, self.args.label_column)
        try:
            encoded = data.map(
                functions[self.task],
                batched=True,
                with_indices=True,
                remove_columns=data.column_names,
                load_from_cache_file=False,
            )
        except ProblemError as error:
            raise ProblemError(f"{where}: {error}") from error
        if self.task == "text-classification":
            return encoded.cast_column("labels", ClassLabel(names=list(self.names)))
        if self.task == "regression":
            return encoded.cast_column("labels", Value("float32"))
        return encoded

    def _require_kinds(self, data: Dataset, where: str) -> None:
        args, words = self.args, self.task == "token-classification"
        kinds = {name: kind_of(feature) for name, feature in data.features.items()}
        texts = [args.tokens_column] if words else list(args.text_columns)
        if not words and args.target_column and not TASKS[self.task].classes:
            texts.append(args.target_column)
        for column in texts:
            if not kinds[column].endswith("string") or kinds[column].startswith("list") != words:
                wanted = "lists of words (JSON or Parquet has them)" if words else "text"
                raise ProblemError(
                    f"{where}: column {column!r} holds {kinds[column]}, not {wanted}; name another"
                )
        label = kinds.get(args.label_column, "")
        if self.task == "regression" and not label.startswith(("int", "uint", "float")):
            values = data[args.label_column][:]
            row = next((n for n, value in enumerate(values) if not _is_number(value)), 0)
            raise ProblemError(
                f"{where}: column {args.label_column!r} holds {label}, not numbers; correct row "
                f"{row + 1}, {values[row]!r}"
            )

    def _texts(self, rows: Rows, indices: list[int]) -> dict[str, Any]:
        columns = [rows[column] for column in self.args.text_columns]
        for name, texts in zip(self.args.text_columns, columns, strict=True):
            for text, index in zip(texts, indices, strict=True):
                if not text.strip():
                    raise ProblemError(f"column {name!r} is blank in row {index + 1}; remove it")
        return dict(self.tokenizer(*columns, truncation=True, max_length=self.args.max_length))

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise ProblemError(
                f"the label {name!r} is not in the training examples"
                f"{did_you_mean(name, self.names)}; remove its rows, or add training examples of it"
            )
        return self.names.index(name)

    def _classes(self, rows: Rows, indices: list[int]) -> Rows:
        labels = [self._number(name) for name in rows[self.args.label_column]]
        return {**self._texts(rows, indices), "labels": labels}

    def _numbers(self, rows: Rows, indices: list[int]) -> Rows:
        numbers = rows[self.args.label_column]
        for number, index in zip(numbers, indices, strict=True):
            if not math.isfinite(number):
                raise ProblemError(f"the label of row {index + 1} is {number}; remove the row")
        return {**self._texts(rows, indices), "labels": numbers}

    def _tags(self, rows: Rows, indices: list[int]) -> Rows:
        """The first token of a word has the word's tag, the others the ignored label."""
        words, tags = rows[self.args.tokens_column], rows[self.args.label_column]
        for own, index in zip(words, indices, strict=True):
            if None in own:
                raise ProblemError(f"row {index + 1} has an empty word; fill or remove it")
        result = self.tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=self.args.max_length
        )
        labels = []
        for row, index in enumerate(indices):
            if len(words[row]) != len(tags[row]):
                raise ProblemError(
                    f"row {index + 1} has {len(words[row])} words and {len(tags[row])} tags; give "
                    "each word a tag"
                )
            last, own = None, []
            for word in result.word_ids(row):
                first = word is not None and word != last
                own.append(self._number(tags[row][word]) if first else IGNORED)
                last = word
            labels.append(own)
        return {**result, "labels": labels}

    def _language(self, rows: Rows, indices: list[int]) -> Rows:
        """Text and end-of-text token; a prompt before a target has no labels."""
        (column,), limit = self.args.text_columns, self.args.max_length
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row, index in enumerate(indices):
            text = self.tokenizer(rows[column][row])["input_ids"]
            if self.args.target_column is None:
                prompt: list[int] = []
                answer = text[:limit] if text[-1:] == end else [*text, *end][:limit]
            else:
                target = rows[self.args.target_column][row]
                answer = self.tokenizer(target, add_special_tokens=False)["input_ids"]
                answer = [*answer, *end][:limit]
                # A long prompt loses its beginning.
                prompt = text[max(0, len(text) + len(answer) - limit) :]
            ids = prompt + answer
            labels = [IGNORED] * len(prompt) + answer
            if all(label == IGNORED for label in labels[1:]):
                raise ProblemError(f"row {index + 1} has no token to predict; remove it")
            encoded["input_ids"].append(ids)
            encoded["attention_mask"].append([1] * len(ids))
            encoded["labels"].append(labels)
        return encoded

    def _pairs(self, rows: Rows, indices: list[int]) -> Rows:
        targets = self.tokenizer(
            text_target=rows[self.args.target_column or ""],
            truncation=True,
            max_length=self.args.max_length,
        )["input_ids"]
        for target, index in zip(targets, indices, strict=True):
            if not target:
                raise ProblemError(f"row {index + 1} has no token to predict; remove it")
        return {**self._texts(rows, indices), "labels": targets}


def class_names(data: Dataset, column: str, tags: bool) -> tuple[str, ...]:
    """The classes in ``column``, sorted as numbers or as words.

    Args:
        data: the training examples.
        column: the name of the column of classes, or of lists of classes.
        tags: whether the column must hold lists.

    Raises:
        ProblemError: the column does not hold classes.
    """
    kind, feature = kind_of(data.features[column]), data.features[column]
    wanted = "lists of classes (JSON or Parquet has them)" if tags else "classes"
    if kind.startswith("list") != tags or "float" in kind or kind.count("list") > 1:
        hint = "; use task regression for numbers" if kind.startswith("float") else ""
        raise ProblemError(f"column {column!r} holds {kind}, not {wanted}{hint}")
    inner = feature.feature if tags else feature
    if isinstance(inner, ClassLabel):
        return tuple(inner.names)
    every = [tag for row in data[column] for tag in row] if tags else data[column][:]
    try:
        names = tuple(str(value) for value in sorted(set(every)))
    except TypeError as error:  # numbers and words, or other types
        kinds = ", ".join(sorted({type(value).__name__ for value in every}))
        raise ProblemError(
            f"column {column!r} holds {kinds}; make all classes words, or all numbers"
        ) from error
    if not all(name.strip() for name in names):
        raise ProblemError(f"column {column!r} has a blank label; fill it or remove its rows")
    return names


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _named(data: Dataset, column: str) -> Dataset:
    """``data`` with the name of each class, whatever the stored type."""
    feature = data.features[column]
    tags = kind_of(feature).startswith("list")
    inner = feature.feature if tags else feature

    def name(value: Any) -> str:
        if not isinstance(inner, ClassLabel):
            return str(value)
        # Unlabelled examples in data sets of the hub have the class -1.
        return inner.int2str(value) if value >= 0 else str(value)

    named = [[name(tag) for tag in row] if tags else name(row) for row in data[column]]
    return data.remove_columns(column).add_column(column, named)
