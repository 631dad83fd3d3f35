"""Comparisons of few and short runs of tiny models."""

from __future__ import annotations

import functools
from typing import Any

from peft import LoraConfig

from hyperopt_peft import BiDoRA, BilevelTrainingArguments
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_methods
from hyperopt_peft.problems import LoRA
from tests.support.trainers import TASKS, base_model, data

METHODS = {"LoRA": LoRA(), "BiDoRA": BiDoRA()}
#: These and their ablations, as tables name them.
TITLES = ["LoRA", "BiDoRA", "BiDoRA, upper level frozen", "BiDoRA, one level"]
#: Arguments of each trainer: an upper step after two lower ones, in batches of four rows.
ARGUMENTS: dict[str, Any] = {"report_to": "none", "use_cpu": True, "lower_steps": 2}
ARGUMENTS |= {"per_device_train_batch_size": 4}
#: Few runs of 12 passes.
SHORT: dict[str, Any] = {
    "passes": 12,
    "seeds": [0, 1],
    "choice": Choice([6e-2], [1e-2]),
    "runs": Runs(progress=False),
}


def accuracy(outputs: Any) -> dict[str, float]:
    return {"accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())}


def parts_of(kind: str, arguments: Any = None) -> tuple[Any, LoraConfig, Any]:
    """What makes the base model of the task ``kind``, its adapter, and the arguments."""
    task, targets = TASKS[kind]
    config = LoraConfig(task_type=task, r=2, target_modules=targets[:2])
    args = BilevelTrainingArguments("unused", **{**ARGUMENTS, **(arguments or {})})
    return functools.partial(base_model, kind), config, args


def compared(
    methods: Any = METHODS, kind: str = "classes", arguments: Any = None, **options: Any
) -> Comparison:
    """A comparison on 30 training rows and 20 test rows of the task ``kind``."""
    settings: dict[str, Any] = {
        "train_dataset": data(kind, 30),
        "test_dataset": data(kind, 20, seed=5),
        **SHORT,
    }
    if kind in ("classes", "tokens"):
        settings |= {"metric": "accuracy", "compute_metrics": accuracy}
    return compare_methods(methods, *parts_of(kind, arguments), **{**settings, **options})
