"""Small runs of `SourceTrainer`: a right source, a wrong one, and a few trusted rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import PrinterCallback, default_data_collator

from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.problems import SourceTrainer, SourceWeights
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


def trainer(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    kind: str = "classes",
    data: Any = None,
    trusted: Any = None,
    double: bool = False,
    weights: Any = SourceWeights,
    **options: Any,
) -> SourceTrainer:
    """A trainer without dropout; ``double`` is in float64, ``kind`` is a task of random rows.

    ``trusted`` is False for none, and ``weights`` an argument of the trainer.
    """
    settings = {
        "output_dir": str(folder),
        "max_steps": 30,
        "lower_steps": 1,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3e-2,
        "upper_learning_rate": 0.3,
        "hypergradient": "darts:xi=1.0",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    model = peft_model(kind, dropout=0.0, dora=False)
    if kind != "classes":
        data = {"a": random_rows(kind, seed=1), "b": random_rows(kind, seed=2)}
        trusted = random_rows(kind, 9, seed=3)
    trusted = rows(30, 3) if trusted is None else trusted
    made = SourceTrainer(
        model.double() if double else model,
        BilevelTrainingArguments(**{**settings, **options}),
        sources=sources() if data is None else data,
        trusted=None if trusted is False else trusted,
        weights=weights,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made
