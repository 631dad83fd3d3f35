"""Comparisons of few and short runs of tiny models."""

import functools
from dataclasses import fields, replace
from typing import Any

from peft import LoraConfig

from hyperopt_peft import BiDoRA, BilevelTrainingArguments
from hyperopt_peft.comparison import Choice, Comparison, Runs, compare_heads, compare_methods
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
#: Options of `compared` that are fields of a `Choice` or of `Runs`.
OF_CHOICE = {each.name for each in fields(Choice)}
OF_RUNS = {each.name for each in fields(Runs)}


def accuracy(outputs: Any) -> dict[str, float]:
    return {"accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())}


def passes_of(result: Any) -> float:
    """The passes that a run had; scores on held-out rows are beside its budget."""
    return sum(x for name, x in result["spent"].items() if name != "held-out scores")


def parts_of(kind: str, arguments: Any = None) -> tuple[Any, LoraConfig, Any]:
    """What makes the base model of the task ``kind``, its adapter, and the arguments."""
    task, targets = TASKS[kind]
    config = LoraConfig(task_type=task, r=2, target_modules=targets[:2])
    args = BilevelTrainingArguments("unused", **{**ARGUMENTS, **(arguments or {})})
    return functools.partial(base_model, kind), config, args


def compared(
    methods: Any = METHODS, kind: str = "classes", arguments: Any = None, **options: Any
) -> Comparison:
    """A comparison on 30 training rows and 20 test rows of the task ``kind``, or of ``heads``."""
    for name, names in {"choice": OF_CHOICE, "runs": OF_RUNS}.items():
        given = {key: options.pop(key) for key in names & options.keys()}
        options.setdefault(name, replace(SHORT[name], **given))
    settings: dict[str, Any] = {
        "train_dataset": data(kind, 30),
        "test_dataset": data(kind, 20, seed=5),
        **SHORT,
    }
    if kind in ("classes", "tokens"):
        settings |= {"metric": "accuracy", "compute_metrics": accuracy}
    model, adapter, args = parts_of(kind, arguments)
    settings |= options
    if settings.pop("heads", False):
        del settings["passes"], settings["choice"]
        return compare_heads(methods, model, args, **settings)
    return compare_methods(methods, model, adapter, args, **settings)
