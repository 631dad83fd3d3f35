"""The tasks of the study: states of the frozen layers, of training and of test rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import ClassLabel, Dataset
from sklearn.metrics import accuracy_score, f1_score
from text_data import load_model, tweets
from torch import Tensor

from benchmarks.last_layers import LastLayers, States, disjoint, encode, tagged_tweets
from hyperopt_peft.core.logits import IGNORED

#: Public data next to the repository: SST-2, and TREC's questions.
DATA = Path(__file__).parents[3] / "shared/data"


@dataclass(frozen=True)
class Task:
    """A task's rows by number.

    Attributes:
        states: inputs and labels of all rows; with a label a token in ``tags``.
        classes: the number of classes.
        pool, test: the numbers of the rows; training rows are drawn from the pool.
        metric: the score of true labels and guesses, higher is better.
    """

    states: States
    classes: int
    pool: Tensor
    test: Tensor
    metric: Callable[[Any, Any], float] = accuracy_score

    @property
    def of_tokens(self) -> bool:
        """Whether each token has a label."""
        return self.states.labels.dim() == 2

    def drawn(self, size: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
        """Rows of the pool to train on, and others, at most ``held_out``."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        rows = self.pool[order].tolist()
        return rows[:size], rows[size : size + held_out]

    def dataset(self, rows: Sequence[int]) -> Dataset:
        """Numbers of rows; where each class has five also the classes, which splits keep."""
        labels = self.states.labels[list(rows)]
        counts = [] if self.of_tokens else labels.bincount(minlength=self.classes).tolist()
        if self.of_tokens or min(filter(None, counts)) < 5:
            return Dataset.from_dict({"row": list(rows)})
        names = [str(k) for k in range(self.classes)]
        data = Dataset.from_dict({"row": list(rows), "label": labels.tolist()})
        return data.cast_column("label", ClassLabel(names=names))

    def model(self, layers: int) -> LastLayers:
        """The last layers with a new head, drawn from the current seed."""
        base = load_model("minilm", ["no", "yes"])
        return LastLayers(base, self.classes, 6 - layers, pool=not self.of_tokens)

    @torch.no_grad()
    def logits(self, model: Any, rows: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits and labels of the rows, or of their labelled tokens, without dropout."""
        was_training = model.training
        model.eval()
        logits, labels = [], []
        for part in torch.as_tensor(rows).split(100):
            batch = self.states([{"row": row} for row in part.tolist()])
            labelled = batch["labels"] != IGNORED
            output = model(states=batch["states"], mask=batch["mask"]).logits
            logits.append(output[labelled])
            labels.append(batch["labels"][labelled])
        model.train(was_training)
        return torch.cat(logits), torch.cat(labels)


def entities_f1(truth: Tensor, guess: Tensor) -> float:
    """The micro-averaged F1 of all tags but the last one, O."""
    named = list(range(int(truth.max())))
    return float(f1_score(truth, guess, labels=named, average="micro"))


@cache
def task(name: str, *, layers: int, length: int, pool: int, test: int) -> Task:
    """A task by name, with texts cut to ``length`` tokens, and at most as many rows of a kind."""
    if name == "tags":
        return tags(length, 6 - layers, pool, test)
    train, apart = TABLES[name]()
    table = pandas.concat([train[:pool], apart[:test]])
    labels = torch.tensor(table.label.to_numpy())
    numbers = torch.arange(len(table)).split([len(train[:pool]), len(apart[:test])])
    states = encode(list(table.text), labels, length, 6 - layers)
    return Task(states, int(labels.max()) + 1, *_apart(numbers, list(table.text), length))


def tags(length: int, frozen: int, pool: int, test: int) -> Task:
    """Named entities in tweets: the first token of each word has the word's tag."""
    rows = tagged_tweets()
    test = min(test, 2 * len(rows) // 5)  # there are 918; 300 are trained on, 200 held out
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    names = [*sorted({tag for row in rows for _, tag in row} - {"O"}), "O"]
    rows = [rows[k] for k in order[: pool + test]]
    words = [[word for word, _ in row] for row in rows]
    classes = [[names.index(tag) for _, tag in row] for row in rows]
    numbers = torch.arange(len(rows)).split([len(rows) - test, test])
    states = encode(words, classes, length, frozen)
    return Task(states, len(names), *_apart(numbers, words, length), metric=entities_f1)


def _apart(numbers: Sequence[Tensor], texts: Sequence[Any], length: int) -> list[Tensor]:
    """The pool without rows like those of the test, and the test."""
    test, pool = disjoint([*reversed(numbers)], texts, length)
    return [pool, test]


def _trec() -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Questions of six classes with a gold label; the second half is the published test set."""
    lines = (DATA / "trec/gold.jsonl").read_text().splitlines()
    table = pandas.DataFrame([json.loads(line) for line in lines])
    return table[:500], table[500:]


def _sst2() -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Movie sentences, positive or negative; rows of the published parts."""
    read = {"sep": "\t", "names": ["label", "text"], "quoting": 3}
    parts = (pandas.read_csv(DATA / f"sst2/{name}.tsv", **read) for name in ("train", "dev"))
    train, test = (part.sample(frac=1, random_state=0) for part in parts)
    return train, test


def _tweets() -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Tweets, negative, neutral or positive."""
    table = tweets().to_pandas().sample(frac=1, random_state=0)
    return table[1000:], table[:1000]


#: Rows of the pool, and test rows.
TABLES: dict[str, Callable[[], tuple[pandas.DataFrame, pandas.DataFrame]]] = {
    "trec": _trec,
    "sst2": _sst2,
    "tweets": _tweets,
}
