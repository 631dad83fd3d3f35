"""A small mix: a source with right labels, one with wrong ones, and a few trusted rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import default_data_collator

from hyperopt_peft.problems import MixTrainer, MixTrainingArguments
from tests.support.head_rows import as_probabilities
from tests.support.trainers import data as random_rows
from tests.support.trainers import peft_model


def rows(count: int, seed: int, *, wrong: bool = False) -> Dataset:
    """Random tokens after one of the class; ``wrong`` moves the class by one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (count, 6), generator=generator)
    classes = torch.randint(0, 3, (count,), generator=generator)
    ids[:, 0] = torch.tensor([3, 20, 40])[classes]
    columns = {"input_ids": ids.tolist(), "labels": ((classes + wrong) % 3).tolist()}
    kinds = {"input_ids": List(Value("int64")), "labels": ClassLabel(names=["a", "b", "c"])}
    return Dataset.from_dict(columns, features=Features(kinds))


def sources(count: int = 48) -> dict[str, Dataset]:
    return {"good": rows(count, 1), "bad": rows(count, 2, wrong=True)}


def votes(count: int, *, sure: float | None = None) -> Dataset:
    """Rows with the votes of two functions, one of which is wrong by a class.

    With ``sure`` they are probabilities, this one that of the class.
    """
    return voted(rows(count, 4), sure).remove_columns("labels")


def voted(table: Dataset, sure: float | None = None) -> Dataset:
    """``table`` with these votes."""
    right = torch.tensor(table["labels"][:])
    columns = torch.stack([right, (right + 1) % 3], 1)
    columns[::2, 0] = columns[1::5, 1] = -1
    if sure is not None:
        columns = as_probabilities(columns, 3, sure)
    return table.add_column("votes", columns.tolist())


def trainer(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    kind: str = "classes",
    data: Any = None,
    trusted: Any = None,
    double: bool = False,
    **options: Any,
) -> MixTrainer:
    """A trainer without dropout; ``double`` is in float64, ``kind`` is a task of random rows."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 30,
        "lower_steps": 1,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-2,
        "upper_learning_rate": 0.3,
        "search": "adapter",
        "hypergradient": "darts:xi=1.0",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "retrain_steps": 5,
    }
    model = peft_model(kind, dropout=0.0, dora=False)
    if kind != "classes":
        data = {"a": random_rows(kind, seed=1), "b": random_rows(kind, seed=2)}
        trusted = random_rows(kind, 9, seed=3)
    return MixTrainer(
        model.double() if double else model,
        MixTrainingArguments(**{**settings, **options}),
        sources=sources() if data is None else data,
        trusted=rows(30, 3) if trusted is None else trusted,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
