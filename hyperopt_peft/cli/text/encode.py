"""Rows of texts encoded as token numbers and labels, by a function for each task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from datasets import ClassLabel, Dataset, Value
from transformers.utils import logging

from hyperopt_peft.cli.text.data import DataArguments, cache_folder, require_columns
from hyperopt_peft.core.logits import IGNORED
from hyperopt_peft.errors import ProblemError, did_you_mean

logger = logging.get_logger(__name__)
#: Some rows, as the values of each column.
Batch = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of one task, whose classes are ``names``, in the order of their numbers."""

    task: str
    args: DataArguments
    tokenizer: Any
    names: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return self.args.columns(self.task)

    def encode(self, data: Dataset, where: str, keep: Collection[str] = ()) -> Dataset:
        """The arguments of the model's forward, ``labels`` and the columns to ``keep``."""
        require_columns(data, self.columns, where)
        left = [name for name in data.column_names if name not in keep]
        if self.names:
            data = named(data, self.args.label_column, self.names, where)
        encode = {
            "token-classification": self._tags,
            "causal-lm": self._language,
            "seq2seq": self._pairs,
        }.get(self.task, self._labelled)

        def encoded(batch: Batch, indices: list[int]) -> Batch:
            rows = (dict(zip(batch, row)) for row in zip(*batch.values()))
            for_each(self._check, rows, indices, where)
            result = encode(batch)
            if self.task == "causal-lm":
                for_each(_check_labels, result["labels"], indices, where)
            return result

        rows = data.map(
            encoded,
            batched=True,
            with_indices=True,
            remove_columns=left,
            cache_file_name=f"{cache_folder()}/{uuid4()}.arrow",
        )
        if self.task == "text-classification":
            return rows.cast_column("labels", ClassLabel(names=list(self.names)))
        return rows.cast_column("labels", Value("float32")) if self.task == "regression" else rows

    def _check(self, row: Mapping[str, Any]) -> None:
        """Raise ProblemError if the task cannot learn ``row``."""
        *texts, last = self.columns
        label = row[last]
        if self.task == "token-classification":
            words = row[texts.pop()]
            lists = isinstance(words, list) and isinstance(label, list)
            if not lists or len(words) != len(label):
                raise ProblemError(
                    f"{words!r} and {label!r} are not lists of words and tags of one length; JSON "
                    "and Parquet files have lists"
                )
        elif self.task in ("causal-lm", "seq2seq"):
            texts.append(last)
        elif not self.names and not math.isfinite(number(label)):
            raise ProblemError(f"the label {label!r} is no finite number; correct or remove it")
        for column in texts:
            if not isinstance(text := row[column], str) or not text.strip():
                raise ProblemError(f"{column!r} has {text!r}, no text; fill it or remove the row")

    def _tokens(self, *texts: Any, **options: Any) -> Any:
        return self.tokenizer(*texts, truncation=True, max_length=self.args.max_length, **options)

    def _labelled(self, batch: Batch) -> Batch:
        label_number: Callable[[Any], float] = self.names.index if self.names else number
        labels = [label_number(label) for label in batch[self.args.label_column]]
        return {**self._tokens(*map(batch.get, self.args.text_columns)), "labels": labels}

    def _tags(self, batch: Batch) -> Batch:
        """The first token of a word has the word's tag, the others the ignored label."""
        result = self._tokens(batch[self.args.tokens_column], is_split_into_words=True)
        labels = list[list[int]]()
        for row, tags in enumerate(batch[self.args.label_column]):
            words, numbers = result.word_ids(row), [*map(self.names.index, tags)]
            pairs = zip(words, [None, *words])
            labels.append([IGNORED if x in (None, last) else numbers[x] for x, last in pairs])
        return {**result, "labels": labels}

    def _language(self, batch: Batch) -> Batch:
        """Text and end-of-text token; a prompt before a target has no labels."""
        (column,), limit = self.args.text_columns, self.args.max_length
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        texts = self.tokenizer(batch[column])["input_ids"]
        rows: list[tuple[list[int], list[int]]]  # prompts and answers
        if self.args.target_column is None:
            rows = [([], text if text[-1:] == end else text + end) for text in texts]
        else:
            targets = self.tokenizer(batch[self.args.target_column], add_special_tokens=False)
            rows = [(text, target + end) for text, target in zip(texts, targets["input_ids"])]
        result: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in rows:
            answer = answer[:limit]
            prompt = prompt[max(0, len(prompt) + len(answer) - limit) :]  # loses its beginning
            result["input_ids"].append(prompt + answer)
            result["attention_mask"].append([1] * len(prompt + answer))
            result["labels"].append([IGNORED] * len(prompt) + answer)
        return result

    def _pairs(self, batch: Batch) -> Batch:
        sources = batch[self.args.text_columns[0]]
        targets = self._tokens(text_target=batch[self.args.target_column or ""])
        return {**self._tokens(sources), "labels": targets["input_ids"]}


def _check_labels(labels: list[int]) -> None:
    if all(label == IGNORED for label in labels[1:]):
        raise ProblemError("there is no token to predict; remove it")


def number(label: Any) -> float:
    """``label`` as a number, or NaN; one entry that is no number makes a file's column text."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return math.nan


def for_each(
    function: Callable[[Any], Any], values: Iterable[Any], indices: Iterable[int], where: str
) -> list[Any]:
    """The results of ``function`` for each value; its error gets ``where`` and the row's index."""
    results = []
    for index, value in zip(indices, values):
        try:
            results.append(function(value))
        except ProblemError as error:
            raise ProblemError(f"{where}: row {index} (from 0): {error}") from error
    return results


def class_names(data: Dataset, column: str) -> tuple[str, ...]:
    """The classes in a column of classes or of lists of tags, sorted as numbers or as words."""
    feature, values = data.features[column], data[column][:]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return tuple(inner.names)
    if inner is not feature:
        values = [tag for tags in values for tag in tags]
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or not kinds <= {str, int, bool}:
        raise ProblemError(
            f"column {column!r} holds {', '.join(sorted(kind.__name__ for kind in kinds))}, not "
            "classes: give words, or whole numbers; fractions are for task regression"
        )
    names = tuple(str(value) for value in sorted(set(values)))
    if len(names) < 2:
        raise ProblemError(f"column {column!r} has one class, {names[0]!r}; add rows of another")
    counts = Counter(name.strip() for name in names)
    if odd := [name for name in names if not name.strip() or counts[name.strip()] > 1]:
        raise ProblemError(f"column {column!r}: {odd} are blank or differ by spaces; correct them")
    cases = Counter(name.casefold() for name in names)
    if alike := [x for x in sorted(names, key=str.casefold) if cases[x.casefold()] > 1]:
        rows = Counter(map(str, values))
        each = ", ".join(f"{name!r} ({rows[name]} rows)" for name in alike)
        logger.warning_once(f"column {column!r}: {each} differ in case alone; are they one class?")
    return names


def named(data: Dataset, column: str, names: Sequence[str], where: str) -> Dataset:
    """``data`` with the names of the classes in ``column``, whatever type the column has.

    Raises:
        ProblemError: a class is not among ``names``; ``where`` names the rows.
    """
    inner, known = getattr(data.features[column], "feature", data.features[column]), {*names}

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(name, value)]
        # Unlabelled examples in data sets of the hub have the class -1.
        text = inner.int2str(value) if isinstance(inner, ClassLabel) and value >= 0 else str(value)
        if text not in known:
            near = did_you_mean(text, names)
            raise ProblemError(f"the label {text!r} is not in the training examples{near}")
        return text

    values = for_each(name, data[column], range(len(data)), where)
    return data.remove_columns(column).add_column(column, values)


def warn_of_one_class(data: Dataset, column: str, where: str) -> None:
    """Warn if the rows ``data``, which ``where`` names, have one class in ``column``."""
    if len(data) > 1 and len(data.unique(column)) == 1:
        logger.warning(f"{where} all have one label: a constant answer looks perfect; add others")
