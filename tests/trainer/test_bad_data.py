"""Data that do not fit get one error that names them and says what to do, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict

from hyperopt_peft import ProblemError
from tests.support.refusals import APART, cases, refuses, relabelled, rows
from tests.support.trainers import data, peft_model, trainer


def rare(times: Any) -> Any:
    """Class c in ``times`` of 48 rows only."""
    table = data(rows=48).remove_columns("labels")
    labels = [2] * times + [row % 2 for row in range(48 - times)]
    return table.add_column("labels", labels).cast_column(
        "labels", ClassLabel(names=["a", "b", "c"])
    )


def unlabelled() -> Any:
    """Two rows without a class."""
    table = data()
    labels = [None if row < 2 else label for row, label in enumerate(table["labels"])]
    return table.remove_columns("labels").add_column(
        "labels", labels, feature=table.features["labels"]
    )


def again(table: Any) -> Any:
    """The same rows in another object with another fingerprint, columns in another order."""
    columns = table.column_names[::-1]
    copied = Dataset.from_dict({c: table[c][:] for c in columns}, features=table.features)
    return copied.select(range(len(copied))[::-1]).select_columns(columns)


DATA = {
    "none": ({"train_dataset": None}, "train_dataset: there is none"),
    "empty": ({"train_dataset": rows(0, 0)}, "train_dataset has no examples"),
    "all splits": (
        {"train_dataset": DatasetDict(train=data())},
        r'must be one data set, got a DatasetDict; .*train_dataset\["train"\]',
    ),
    "a name": ({"train_dataset": "imdb"}, "must be one data set, got a str"),
    "a list to split": (
        {"train_dataset": list(data())},
        "only a datasets.Dataset can be split, got list; .*upper_dataset",
    ),
    "labels that are text": (
        {
            "train_dataset": data()
            .remove_columns("labels")
            .add_column("label", ["good", "bad", "fair"] * 8)
        },
        "label.*class_encode_column",
    ),
    "labels that are missing": (
        {"train_dataset": unlabelled()},
        "2 of 24 training examples have no label; remove them",
    ),
    "too few examples": ({"train_dataset": rows(0, 1)}, "cannot give 20% of 1 training examples"),
    "a class with one example": (
        {"train_dataset": rare(1)},
        "cannot give 20% of 48 training examples to the upper level: .*least populated class",
    ),
    "a class that the upper level lacks": (
        {"train_dataset": rare(2)},
        "class 2 has only 2 examples, and the upper level would get none; change upper_fraction",
    ),
    "no common columns": (
        {**APART, "upper_dataset": Dataset.from_dict({"text": ["a", "b"]})},
        "train_dataset and upper_dataset have no column in common",
    ),
    "the training set as upper": (
        {"train_dataset": APART["train_dataset"], "upper_dataset": APART["train_dataset"]},
        "30 of 30 examples of upper_dataset are in train_dataset too",
    ),
    "overlap": (
        {"train_dataset": rows(0, 30), "upper_dataset": again(rows(27, 60))},
        "3 of 33 examples of upper_dataset are in train_dataset too",
    ),
    "the evaluation set as upper": (
        {**APART, "eval_dataset": APART["upper_dataset"]},
        "eval_dataset is given as the upper level's data",
    ),
    "a part of the evaluation set as upper": (
        {"train_dataset": rows(0, 20), "upper_dataset": rows(20, 30), "eval_dataset": rows(20, 60)},
        "eval_dataset is given as the upper level's data",
    ),
    "one of the evaluation sets as upper": (
        {**APART, "eval_dataset": {"a": data(seed=5), "b": APART["upper_dataset"]}},
        "eval_dataset is given as the upper level's data",
    ),
    "more classes than outputs": (
        {"train_dataset": relabelled(["a", "b", "c", "d"])},
        "labels.*num_labels=4",
    ),
    "columns of another model": (
        {"train_dataset": Dataset.from_dict({"text": ["a"] * 10})},
        "train_dataset: No columns in the dataset match",
    ),
}


@cases(DATA)
def test_data(case: Any, tmp_path: Path) -> None:
    options, message = case
    model = peft_model()
    refuses(ProblemError, message, model, lambda: trainer(tmp_path, model=model, options=options))


def test_a_part_of_the_training_set_may_be_evaluated_on(tmp_path: Path) -> None:
    """`eval_dataset` may be the training set itself, for a measure of the fit."""
    table = data()
    trainer(tmp_path, options={"train_dataset": table, "eval_dataset": table})


def test_labels_that_a_collator_changes_are_left_to_it(tmp_path: Path) -> None:
    table = relabelled(["a", "b", "c", "d"])

    def folded(examples: Any) -> Any:
        batch = {key: torch.tensor([row[key] for row in examples]) for key in examples[0]}
        return {**batch, "labels": batch["labels"] % 3}

    run = trainer(tmp_path, options={"train_dataset": table, "data_collator": folded})
    run.train()
    assert run.state.global_step == 6


def test_no_batch_is_left(tmp_path: Path) -> None:
    """24 examples give the lower level 19: less than a batch of 20, which is then dropped."""
    with pytest.raises(ProblemError, match="dataloader_drop_last"):
        trainer(tmp_path, per_device_train_batch_size=20, dataloader_drop_last=True)
    run = trainer(tmp_path, per_device_train_batch_size=19, dataloader_drop_last=True)
    run.train()
    assert run.state.global_step == 6
