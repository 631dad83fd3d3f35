"""A guess of a table's task and columns, from the columns' names, types and values."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Value

from hyperopt_peft.cli.text.data import TRAIN, require_columns
from hyperopt_peft.cli.text.encode import class_names, number
from hyperopt_peft.cli.text.tasks import SFT
from hyperopt_peft.errors import ProblemError

TEXTS = ("text", "tweet", "sentence", "review", "content", "comment", "message", "question")
LABELS = ("label", "sentiment", "class", "category", "intent", "topic", "target", "stars", "score")
TAGS = ("ner_tags", "tags", "pos_tags", "labels", "label")
CONVERSATIONS = (("messages",), ("prompt", "completion"), ("text",))
PROMPTS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
USUAL = {*TEXTS, *LABELS, *TAGS, "tokens", "words"}.union(*CONVERSATIONS, *PROMPTS, *PAIRS)
MOST_CLASSES = 100
NO_LABEL = "give --label_column to name another, or --task causal-lm to learn the texts alone"


class Guess(NamedTuple):
    """The task of a table and its columns; ``classes`` has the classes and their counts."""

    task: str
    texts: list[str]
    label: str | None
    classes: str = ""


def guess(rows: Dataset, task: str | None, texts: list[str] | None, label: str | None) -> Guess:
    """Guess the task and the columns of ``rows`` where they are None.

    Raises:
        ProblemError: no column fits, several fit, or the label column cannot be learned.

    Example:
        >>> table = {"text": [f"row {k}" for k in range(20)], "mood": ["good", "bad"] * 10}
        >>> guess(Dataset.from_dict(table), None, None, None).label
        'mood'
    """
    require_columns(rows, [label] if label else [], TRAIN)
    least = 2 if label else 5  # a user who names the label may mean rare classes
    names, features = rows.column_names, rows.features  # each access copies the features
    lists = [name for name in names if not isinstance(features[name], Value | ClassLabel)]
    prompts = _first(names, PROMPTS)
    if task is None and ("messages" in names or prompts or len(lists) > 1):
        task = "causal-lm" if prompts else "token-classification"
        task = SFT if "messages" in names else task
    if label in lists and task != "token-classification":
        raise ProblemError(f"label_column: {label} has lists or mappings; name another column")
    if task == SFT:
        texts = texts or _first(names, CONVERSATIONS)
    elif task == "token-classification":
        texts = texts or [next((x for x in ("tokens", "words", *lists) if x in names), "tokens")]
        label = label or next((name for name in TAGS if name in lists), None)
    elif task in ("causal-lm", "seq2seq"):
        if texts is None and prompts:
            texts, label = prompts[:1], label or prompts[1]
        texts = texts or _texts(rows, label)
    else:
        texts = texts or _first(names, PAIRS) or _texts(rows, label)
        label = label or _label(rows, [*texts, *lists], task)
        task = task or ("causal-lm" if label is None else _task_of_label(rows, label))
    if texts is None or (label is None and task in ("token-classification", "seq2seq")):
        option = "text_columns" if texts is None else "label_column"
        raise ProblemError(f"task {task}: none of {', '.join(names)} fits; give --{option}")
    require_columns(rows, [*texts, *filter(None, [label])], TRAIN)
    if task != "text-classification" or label is None:
        return Guess(task, texts, label)
    try:
        class_names(rows, label)
    except ProblemError as error:
        raise ProblemError(f"label_column: {error}, or {NO_LABEL}") from error
    counts = Counter(rows[label]).most_common()
    if rare := [str(name) for name, count in counts if count < least]:
        keep = f"keep them by --label_column {label}, " if least > 2 else ""
        raise ProblemError(
            f"label_column: {label} has {len(counts)} classes, and fewer than {least} rows of "
            f"{', '.join(rare[:5])}; remove these rows, join classes, {keep}or {NO_LABEL}"
        )
    most = some([f"{name} {count}" for name, count in counts], 4)
    return Guess(task, texts, label, f"{len(counts)} classes: {most}")


def some(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first ``most`` names, with an ellipsis if there are more."""
    more = ["…"] if len(names) > most else []
    return separator.join([*names[:most], *more])


def require_header(rows: Dataset, file: str) -> None:
    """Raise ProblemError if the columns of ``file`` are named as values are: it has no header."""
    for name in rows.column_names:
        same = name.lower() not in USUAL and name in map(str, rows.unique(name))
        if same or re.fullmatch(r"-?\d+\.\d+", name):
            raise ProblemError(
                f"file: {file} seems to have no header, since a column is named {name!r} like a "
                "value; write a line such as text,label before it, or give --text_columns"
            )


def _first(names: Collection[str], layouts: Sequence[Sequence[str]]) -> list[str] | None:
    """The first of ``layouts`` whose columns are all among ``names``."""
    return next(([*layout] for layout in layouts if {*layout} <= {*names}), None)


def _different(rows: Dataset, name: str) -> int:
    """The number of different values of a column, without None."""
    return len({*rows.unique(name)} - {None})


def _texts(rows: Dataset, label: str | None) -> list[str]:
    """The text column, different in most rows: by its name, then by the length of its texts."""
    lengths = {
        name: sum(map(len, filter(None, rows[name][:500])))
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
        and name != label
        and _different(rows, name) * 2 > len(rows)
    }
    if not lengths:
        names = ", ".join(rows.column_names[:20])
        raise ProblemError(f"text_columns: none of {names} looks like texts; give --text_columns")
    return [min(lengths, key=lambda name: (name.lower() not in TEXTS, -lengths[name]))]


def _label(rows: Dataset, besides: Collection[str], task: str | None) -> str | None:
    """The column to predict; None if no column has a usual name, classes or fractions."""
    few, features = _most_classes(rows), rows.features
    rest = [name for name in rows.column_names if name not in besides]
    kinds = ("float", "int") if task == "regression" else ("float",)
    numbers = [name for name in rest if features[name].dtype.startswith(kinds)]
    classes = [name for name in rest if 2 <= _different(rows, name) <= few]
    if task is not None:
        numbers, classes = (numbers, []) if task == "regression" else ([], classes)
    candidates = list(dict.fromkeys([*classes, *numbers]))
    for columns in (candidates, rest):  # an error says that one with a usual name cannot be learned
        known: dict[str, str] = {name.lower(): name for name in columns}
        if named := [known[name] for name in LABELS if name in known]:
            return named[0]
    if len(candidates) == 1:
        return str(candidates[0])
    if not candidates and task is None:
        return None
    which = some(candidates, 5, " or ")
    which = which or f"none of {some(rest, 20) or 'no further columns'}"
    raise ProblemError(f"label_column: could be {which}; name it with --label_column")


def _most_classes(rows: Dataset) -> int:
    return min(MOST_CLASSES, max(2, len(rows) // 4))


def _task_of_label(rows: Dataset, label: str) -> str:
    """Regression for fractions and for many whole numbers, classification for the rest."""
    kind, many = rows.features[label].dtype, _different(rows, label) > _most_classes(rows)
    if kind.startswith("float") or (kind.startswith("int") and many):
        return "regression"
    if many and kind in ("string", "large_string"):
        values = [str(value).strip() for value in rows[label][:1000]]
        wrong = [row for row, value in enumerate(values) if math.isnan(number(value))]
        if wrong and len(wrong) * 2 < len(values):
            raise ProblemError(
                f"label_column: {label} has {values[wrong[0]]!r} in row {wrong[0]} (from 0) among "
                f"numbers; correct the row, or {NO_LABEL}"
            )
    return "text-classification"
