"""Encoding of a row of texts as token numbers and labels, one function for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from datasets import ClassLabel, Dataset, Value

from hyperopt_peft.cli.text.data import DataArguments, cache_folder
from hyperopt_peft.core.labels import IGNORED
from hyperopt_peft.errors import ProblemError, did_you_mean

Row = Mapping[str, Any]


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

        Raises:
            ProblemError: a value that the task cannot learn; the message has ``where``, the name
                of the data, and the row, from 0.
        """
        if self.names:
            data = _named(data, self.args.label_column)
        encode = {
            "text-classification": self._labelled,
            "regression": self._labelled,
            "token-classification": self._tags,
            "causal-lm": self._language,
            "seq2seq": self._pair,
        }[self.task]

        def encoded(row: Row, index: int) -> Row:
            try:
                return encode(row)
            except ProblemError as error:
                raise ProblemError(f"{where}: row {index} (from 0): {error}") from error

        rows = data.map(
            encoded,
            with_indices=True,
            remove_columns=data.column_names,
            cache_file_name=f"{cache_folder()}/{uuid4()}.arrow",
        )
        if self.task == "text-classification":
            return rows.cast_column("labels", ClassLabel(names=list(self.names)))
        return rows.cast_column("labels", Value("float32")) if self.task == "regression" else rows

    def _texts(self, row: Row) -> dict[str, Any]:
        texts = [_text(row, column) for column in self.args.text_columns]
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.args.max_length))

    def _class(self, name: str) -> int:
        if name not in self.names:
            raise ProblemError(
                f"the label {name!r} is not in the training examples"
                f"{did_you_mean(name, self.names)}; remove its rows, or add training examples of it"
            )
        return self.names.index(name)

    def _labelled(self, row: Row) -> Row:
        label = row[self.args.label_column]
        if self.names:
            label = self._class(label)
        elif not isinstance(label, int | float) or not math.isfinite(label):
            raise ProblemError(f"the label {label!r} is no finite number; correct or remove it")
        return {**self._texts(row), "labels": label}

    def _tags(self, row: Row) -> Row:
        """The first token of a word has the word's tag, the others the ignored label."""
        words, tags = row[self.args.tokens_column], row[self.args.label_column]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ProblemError(
                f"{self.args.tokens_column!r} has {words!r}, not a list of words; JSON and Parquet "
                "files have lists"
            )
        if len(words) != len(tags):
            raise ProblemError(f"{len(words)} words and {len(tags)} tags; give each word a tag")
        result = self.tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=self.args.max_length
        )
        labels, last = [], None
        for word in result.word_ids():
            first = word is not None and word != last
            labels.append(self._class(tags[word]) if first else IGNORED)
            last = word
        return {**result, "labels": labels}

    def _language(self, row: Row) -> Row:
        """Text and end-of-text token; a prompt before a target has no labels."""
        (column,), limit = self.args.text_columns, self.args.max_length
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        text, prompt = self.tokenizer(_text(row, column))["input_ids"], []
        if self.args.target_column is None:
            answer = text if text[-1:] == end else [*text, *end]
        else:
            target = _text(row, self.args.target_column)
            answer = self.tokenizer(target, add_special_tokens=False)["input_ids"] + end
            # A long prompt loses its beginning.
            prompt = text[max(0, len(text) + len(answer[:limit]) - limit) :]
        labels = [IGNORED] * len(prompt) + answer[:limit]
        if all(label == IGNORED for label in labels[1:]):
            raise ProblemError("there is no token to predict; remove it")
        ids = prompt + answer[:limit]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def _pair(self, row: Row) -> Row:
        target = _text(row, self.args.target_column or "")
        labels = self.tokenizer(
            text_target=target, truncation=True, max_length=self.args.max_length
        )
        return {**self._texts(row), "labels": labels["input_ids"]}


def class_names(data: Dataset, column: str) -> tuple[str, ...]:
    """The classes in ``column``, of examples or of lists of tags, sorted as numbers or as words."""
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return tuple(inner.names)
    values = data[column][:]
    if inner is not feature:
        values = [tag for tags in values for tag in tags]
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {str, int, bool}:
        raise ProblemError(
            f"column {column!r} holds {', '.join(sorted(kind.__name__ for kind in kinds))}, not "
            "classes: give words, or whole numbers; fractions are for task regression"
        )
    names = tuple(str(value) for value in sorted(set(values)))
    if not all(name.strip() for name in names):
        raise ProblemError(f"column {column!r} has a blank label; fill it or remove its rows")
    return names


def _text(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ProblemError(f"{column!r} has {text!r}, not a text; fill it or remove the row")
    return text


def _named(data: Dataset, column: str) -> Dataset:
    """``data`` with the name of each class, whatever the stored type."""
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)

    def name(value: Any) -> str:
        # Unlabelled examples in data sets of the hub have the class -1.
        return inner.int2str(value) if isinstance(inner, ClassLabel) and value >= 0 else str(value)

    tags = inner is not feature
    names = [[name(tag) for tag in row] if tags else name(row) for row in data[column]]
    return data.remove_columns(column).add_column(column, names)
