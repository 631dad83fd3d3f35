"""The task and the columns of a user's table, guessed from its names and types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Value

from hyperopt_peft.cli.text import SFT
from hyperopt_peft.cli.text.data import TRAIN, require_columns
from hyperopt_peft.errors import ProblemError

TEXTS = ("text", "tweet", "sentence", "review", "content", "comment", "message", "question")
LABELS = ("label", "sentiment", "class", "category", "intent", "topic", "target", "stars", "score")
TAGS = ("ner_tags", "tags", "pos_tags", "labels", "label")
CONVERSATIONS = (("messages",), ("prompt", "completion"), ("text",))
PROMPTS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
MOST_CLASSES = 100


class Guess(NamedTuple):
    """What a table is for: the task, its columns, and in words the classes with their counts."""

    task: str
    texts: list[str]
    label: str | None
    classes: str = ""


def guess(rows: Dataset, task: str | None, texts: list[str] | None, label: str | None) -> Guess:
    """The task and the columns of ``rows``; what is given is not guessed."""
    require_columns(rows, [label] if label else [], TRAIN)
    names = rows.column_names
    lists = [name for name in names if not isinstance(rows.features[name], Value | ClassLabel)]
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
    if task != "text-classification":
        return Guess(task, texts, label)
    counts = Counter[Any](rows[label]).most_common()
    if rare := [str(name) for name, count in counts if count < 5]:
        raise ProblemError(
            f"label_column: {label} has fewer than 5 rows of {', '.join(rare[:5])}, of which "
            "none can be held out; remove these rows, join classes, or name another column"
        )
    most = ", ".join(f"{name} {count}" for name, count in counts[:4]) + ", …" * (len(counts) > 4)
    return Guess(task, texts, label, f"{len(counts)} classes: {most}")


def _first(names: Collection[str], layouts: Sequence[Sequence[str]]) -> list[str] | None:
    """The first of ``layouts`` whose columns are all among ``names``."""
    return next(([*layout] for layout in layouts if {*layout} <= {*names}), None)


def _texts(rows: Dataset, label: str | None) -> list[str]:
    """The column that looks most like texts, different in most rows: by name, then the longest."""
    lengths = {
        name: sum(map(len, filter(None, rows[name][:500])))
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
        and name != label
        and len(set(rows[name])) * 2 > len(rows)
    }
    if not lengths:
        raise ProblemError(
            f"text_columns: none of {', '.join(rows.column_names)} looks like texts, different in "
            "most rows; name one with --text_columns"
        )
    return [min(lengths, key=lambda name: (name.lower() not in TEXTS, -lengths[name]))]


def _label(rows: Dataset, besides: Collection[str], task: str | None) -> str | None:
    """The column to predict; None if there is none and ``task`` does not ask for one."""
    few = min(MOST_CLASSES, max(2, len(rows) // 4))
    rest = [name for name in rows.column_names if name not in besides]
    kinds = ("float", "int") if task == "regression" else ("float",)
    numbers = [name for name in rest if rows.features[name].dtype.startswith(kinds)]
    classes = [name for name in rest if 2 <= len({*rows[name]} - {None}) <= few]
    if task is not None:
        numbers, classes = (numbers, []) if task == "regression" else ([], classes)
    candidates = list(dict.fromkeys([*classes, *numbers]))
    known: dict[str, str] = {name.lower(): name for name in candidates}
    named = [known[name] for name in LABELS if name in known]
    if named or len(candidates) == 1:
        return (named or candidates)[0]
    if not candidates and task is None:
        return None
    which = " or ".join(candidates) or f"none of {', '.join(rest) or 'no further columns'}"
    raise ProblemError(f"label_column: could be {which}; name it with --label_column")


def _task_of_label(rows: Dataset, label: str) -> str:
    kind, many = rows.features[label].dtype, len(set(rows[label])) > MOST_CLASSES
    numeric = kind.startswith("float") or (kind.startswith("int") and many)
    return "regression" if numeric else "text-classification"
