"""The settings' rows: few, with wrong labels or of unknown sources, and features for heads."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import default_data_collator

from benchmarks.methods.tasks import DATA, Task, collate, disjoint, rows_of_texts, task
from benchmarks.sources import draw, texts_of
from hyperopt_peft.heads import Head, features_of
from hyperopt_peft.heads.head import OnFeatures

#: The share of wrong labels.
WRONG = 0.4
#: Columns that methods read, beside labels.
READ = ("source", "states")


def first_rows(name: str, count: int, **options: Any) -> Task:
    """The first training rows of a task."""
    here = task(name, **options)
    return replace(here, train=here.train.select(range(count)))


def wrong_labels(name: str) -> Task:
    """300 rows, 40 % with a wrong label, and 60 trusted rows; all have frozen features."""
    here, drawn = task(name), random.Random(0)
    rows = here.train.select(range(360)).to_list()
    for row in rows[:300]:
        if drawn.random() < WRONG:
            others = [each for each in range(here.classes) if each != row["target"]]
            row["target"] = drawn.choice(others)
    trusted, train = disjoint(rows[300:], rows[:300])
    data = Dataset.from_list([*train, *trusted])
    x = features_of(here.base_model(), data, collate).x
    data = data.add_column("states", x.tolist())
    count = len(train)
    parts = {"train": range(count), "trusted": range(count, len(data))}
    return replace(here, **{name: data.select(each) for name, each in parts.items()})


def of_sources(name: str) -> Task:
    """Sources of unknown quality, and 60 trusted rows."""
    random.seed(0)
    texts, labels, more = texts_of(name, DATA)
    sources, trusted, test = draw(labels, more, 60)
    rows = rows_of_texts(texts, [0] * len(texts), 16)
    named = [
        {**rows[row], "target": label, "source": source}
        for source, pairs in sources.items()
        for row, label in pairs
    ]
    random.shuffle(named)
    clean = [[{**rows[row], "target": labels[row]} for row in each] for each in (trusted, test)]
    test, trusted, train = map(Dataset.from_list, disjoint(clean[1], clean[0], named))
    return Task(train, test, 1 + max(labels), trusted=trusted)


def on_features(here: Task) -> Task:
    """The rows of a task as the numbers of their features in a model of a head alone.

    Without trusted rows every fifth row is one: a split by classes needs two rows of each.
    """
    if here.trusted is None:
        fifth, count = set(range(0, len(here.train), 5)), len(here.train)
        rest = here.train.select([k for k in range(count) if k not in fifth])
        here = replace(here, train=rest, trusted=here.train.select(sorted(fifth)))
    model = here.base_model()
    tables: dict[str, Any] = {}
    x: list[torch.Tensor] = []
    for name in ("train", "trusted", "test"):
        if (rows := getattr(here, name)) is None:
            continue
        made, begin = features_of(model, rows, here.collate), sum(map(len, x))
        columns = {name: rows[name][:] for name in READ if name in rows.column_names}
        columns["features"] = list(range(begin, begin + len(rows)))
        tables[name] = Dataset.from_dict({**columns, "labels": made.labels.tolist()})
        x.append(made.x)
    head = Head(x[0].shape[1], here.classes)
    made_by = partial(OnFeatures, torch.cat(x), head)
    return replace(here, **tables, model=made_by, collate=default_data_collator)
