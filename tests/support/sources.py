"""Small runs of `Sources`: a right source, a wrong one, and a few trusted rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets
from transformers import default_data_collator

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method
from hyperopt_peft.problems import Sources
from tests.support.trainers import QUIET, peft_model


def rows(count: int, seed: int, *, wrong: bool = False) -> Dataset:
    """Random tokens after one of the class; ``wrong`` moves the class by one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (count, 6), generator=generator)
    classes = torch.randint(0, 3, (count,), generator=generator)
    ids[:, 0] = torch.tensor([3, 20, 40])[classes]
    columns = {"input_ids": ids.tolist(), "labels": ((classes + wrong) % 3).tolist()}
    kinds = {"input_ids": List(Value("int64")), "labels": ClassLabel(names=["a", "b", "c"])}
    return Dataset.from_dict(columns, features=Features(kinds))


def sources(count: int = 48) -> Dataset:
    parts = {"good": rows(count, 1), "bad": rows(count, 2, wrong=True)}
    return concatenate_datasets([p.add_column("source", [n] * count) for n, p in parts.items()])


def trainer(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    data: Any = None,
    trusted: Any = None,
    double: bool = False,
    method: Method | None = None,
    **options: Any,
) -> BilevelTrainer:
    """A trainer without dropout; ``double`` is in float64, ``trusted`` False for none."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 30,
        "lower_steps": 1,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-2,
        "upper_learning_rate": 0.3,
        "hypergradient": "darts:xi=1.0",
        "retrain": "none",
        **QUIET,
    }
    model = peft_model("classes", dropout=0.0, dora=False)
    trusted = rows(30, 3) if trusted is None else trusted
    return BilevelTrainer(
        model.double() if double else model,
        BilevelTrainingArguments(**{**settings, **options}),
        method=method or Sources(),
        train_dataset=sources() if data is None else data,
        upper_dataset=None if trusted is False else trusted,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
