"""The task and the columns of a user's table, guessed from its names and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hyperopt_peft.cli.text.data import TRAIN, require_columns
from hyperopt_peft.errors import ProblemError

TEXTS = ("text", "tweet", "sentence", "review", "content", "comment", "body", "message", "question")
LABELS = ("label", "labels", "sentiment", "class", "category", "intent", "topic", "target", "tag")
SCORES = ("score", "rating", "stars", "value", "similarity", "y")
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "labels", "label")
PROMPTS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
CONVERSATIONS = (("messages",), ("prompt", "completion"), ("text",))
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
MOST_CLASSES = 100
TOKENS = {"min": 32, "max": 256, "of_texts": 1024}


@dataclass(frozen=True)
class Guess:
    """What a table is for: the task, its columns, and the classes with their counts."""

    task: str
    texts: Sequence[str]
    label: str | None
    classes: dict[Any, int]
    max_length: int

    @property
    def summary(self) -> str:
        """The classes with their counts, the commonest first, or nothing."""
        most = [f"{name} {count}" for name, count in list(self.classes.items())[:4]]
        more = ", …" if len(self.classes) > 4 else ""
        return f"{len(self.classes)} classes: {', '.join(most)}{more}" if self.classes else ""

    def options(self) -> list[tuple[str, Any, str]]:
        """Name, value and comment of the options of the columns."""
        texts = [*self.texts]
        if self.task == "sft":
            plain = len(texts) == 1 and texts not in (["messages"], ["text"])
            return [("dataset_text_field", texts[0], "the text")] if plain else []
        if self.task == "token-classification":
            return [
                ("tokens_column", texts[0], "lists of words"),
                ("label_column", self.label, "lists of tags"),
            ]
        if self.task in ("causal-lm", "seq2seq"):
            target = ("target_column", self.label, "the text to produce")
            return [("text_columns", texts, "the text, or the prompt"), target]
        what = "a number to predict" if self.task == "regression" else "the classes"
        return [("text_columns", texts, "one text, or two"), ("label_column", self.label, what)]

    def __str__(self) -> str:
        columns = f"text: {', '.join(self.texts)}"
        if self.label:
            columns += f"; label: {self.label}{' with ' * bool(self.classes)}{self.summary}"
        return f"task: {self.task}; {columns}"


def guess(
    rows: Dataset, task: str | None, texts: list[str] | None, label: str | None, command: str
) -> Guess:
    """The task and the columns of ``rows``; what is given is not guessed.

    Raises:
        ProblemError: nothing fits, several columns fit, a cell is empty, or a class is too rare.

    Example:
        >>> from datasets import Dataset
        >>> tweets = [f"{k} is {'fine' * (k % 2) or 'bad'}" for k in range(10)]
        >>> rows = Dataset.from_dict({"tweet": tweets, "mood": ["sad", "glad"] * 5})
        >>> print(guess(rows, None, None, None, "train"))
        task: text-classification; text: tweet; label: mood with 2 classes: sad 5, glad 5
    """
    require_columns(rows, [*(texts or ()), *filter(None, [label])], TRAIN)
    kinds = {name: _kind(rows[name][:200]) for name in rows.column_names}
    lists = [name for name, kind in kinds.items() if kind == "list"]
    task = task or _task_of_layout(kinds, lists, command)
    unfit = ("dict",) if task == "token-classification" else ("dict", "list")
    if label and kinds[label] in unfit:
        raise ProblemError(f"label_column: {label} has lists or mappings; name another column")
    if wrong := [name for name in texts or () if kinds[name] not in ("text", "list")]:
        raise ProblemError(f"text_columns: {wrong[0]} has no texts; name another column")
    if task == "sft":
        texts, label = texts or _columns_of(kinds, CONVERSATIONS), None
        if texts is None:
            raise ProblemError(
                "task sft: needs a column messages, or prompt and completion, or text; rename the "
                "columns, or give --text_columns"
            )
    elif task == "token-classification":
        texts = texts or [_known(lists, WORDS) or next(iter(lists), "tokens")]
        label = label or _known(lists, TAGS)
        if label is None:
            raise ProblemError("label_column: name the column with the lists of tags")
    elif task in ("causal-lm", "seq2seq"):
        pair = _columns_of(kinds, PROMPTS)
        if texts is None and pair:
            texts, label = pair[:1], label or pair[1]
        texts = texts or _texts(rows, kinds, label)
        if task == "seq2seq" and label is None:
            raise ProblemError("label_column: name the column of the texts to produce")
    else:
        texts = texts or _columns_of(kinds, PAIRS) or _texts(rows, kinds, label)
        label = label or _label(rows, kinds, texts, task)
        task = task or ("causal-lm" if label is None else _task_of_label(rows, kinds, label))
    require_columns(rows, [*texts, *filter(None, [label])], TRAIN)
    classes: dict[Any, int] = {}
    if task == "text-classification":
        classes = dict(Counter(rows[label]).most_common())
        _require_classes(classes, label or "")
    return Guess(task, texts, label, classes, _length(rows, texts, task))


def _kind(values: Sequence[Any]) -> str:
    seen = {type(value) for value in values if value is not None}
    names = {str: "text", bool: "class", int: "whole", float: "number"}
    names |= {list: "list", dict: "dict"}
    return names.get(seen.pop(), "other") if len(seen) == 1 else "other"


def _task_of_layout(names: Collection[str], lists: Sequence[str], command: str) -> str | None:
    """The task that a table of ``names`` alone tells, or None."""
    of_trl = command in ("mix", "attribute")
    if "messages" in names:
        if not of_trl:
            raise ProblemError(
                f"messages: conversations are for attribute and mix, not {command}; give one of "
                "them as --command, or texts"
            )
        return "sft"
    if _columns_of(names, PROMPTS):
        return "sft" if of_trl and {"prompt", "completion"} <= {*names} else "causal-lm"
    return "token-classification" if len(lists) > 1 else None


def _columns_of(names: Collection[str], layouts: Sequence[Sequence[str]]) -> list[str] | None:
    """The first of ``layouts`` whose columns are all among ``names``."""
    return next(([*layout] for layout in layouts if {*layout} <= {*names}), None)


def _known(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The one of ``names`` that comes first in ``known``."""
    found = [name for name in names if name.lower() in known]
    return min(found, key=lambda name: known.index(name.lower()), default=None)


def _texts(rows: Dataset, kinds: Mapping[str, str], label: str | None) -> list[str]:
    """The column that looks most like texts: by name, then the longest."""
    lengths = {
        name: sum(map(len, filter(None, rows[name][:500])))
        for name, kind in kinds.items()
        if kind == "text" and name != label and len(set(rows[name])) * 2 > len(rows)
    }
    if not lengths:
        raise ProblemError(
            f"text_columns: none of {', '.join(kinds)} looks like texts, different in most rows; "
            "name one with --text_columns"
        )
    return [min(lengths, key=lambda name: (name.lower() not in TEXTS, -lengths[name]))]


def _label(
    rows: Dataset, kinds: Mapping[str, str], texts: Sequence[str], task: str | None
) -> str | None:
    """The column to predict; None if there is none and ``task`` does not ask for one."""
    few = min(MOST_CLASSES, max(2, len(rows) // 4))
    rest = [x for x, kind in kinds.items() if x not in texts and kind not in ("list", "dict")]
    classes = [name for name in rest if 2 <= len({*rows[name]} - {None}) <= few]
    numbers = [name for name in rest if kinds[name] in ("number", "whole")]
    candidates = {"regression": numbers, "text-classification": classes}.get(
        task or "", [*classes, *(x for x in numbers if kinds[x] == "number" and x not in classes)]
    )
    known = SCORES if task == "regression" else (*LABELS, *SCORES)
    if (named := _known(candidates, known)) or len(candidates) == 1:
        return named or candidates[0]
    if not candidates and task is None:
        return None
    which = " or ".join(candidates) or f"none of {', '.join(rest) or 'no further columns'}"
    raise ProblemError(f"label_column: could be {which}; name it with --label_column")


def _task_of_label(rows: Dataset, kinds: Mapping[str, str], label: str) -> str:
    many = len(set(rows[label])) > MOST_CLASSES
    numeric = kinds[label] == "number" or (kinds[label] == "whole" and many)
    return "regression" if numeric else "text-classification"


def _require_classes(classes: dict[Any, int], label: str) -> None:
    if len(classes) < 2:
        raise ProblemError(f"label_column: {label} has one class; name another column")
    rare = [str(name) for name, count in classes.items() if count < 5]
    if rare:
        raise ProblemError(
            f"label_column: {label} has fewer than 5 rows of {', '.join(rare[:5])}, of which none "
            "can be held out; remove these rows, join classes, or name another column"
        )


def _length(rows: Dataset, texts: Sequence[str], task: str) -> int:
    """Tokens that 95 of 100 examples do not exceed, at three and a half characters a token."""
    if "messages" in texts:
        return TOKENS["of_texts"]
    values = [rows[name][:2000] for name in texts]
    sizes = sorted(
        sum(len(cell) * (2 if isinstance(cell, list) else 1 / 3.5) for cell in each if cell)
        for each in zip(*values, strict=True)
    )
    most = TOKENS["of_texts"] if task in ("causal-lm", "seq2seq", "sft") else TOKENS["max"]
    wanted = 32 * -(-int(sizes[int(0.95 * (len(sizes) - 1))]) // 32)
    return min(max(wanted, TOKENS["min"]), most)
