"""What the runs of a comparison depend on: the identity of its task and of its methods."""

from __future__ import annotations

import hashlib
import inspect
import sys
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from hyperopt_peft.comparison.heads import HeadTask
from hyperopt_peft.comparison.task import Task, without_sizes
from hyperopt_peft.trainer.fingerprint import data_fingerprint
from hyperopt_peft.utils.versions import versions


def settings_of(task: Task) -> dict[str, Any]:
    """The settings on which all runs of ``task`` depend, for its store.

    Raises:
        ProblemError: ``base_model`` returns one model again and again.
    """
    data, head = task.data, isinstance(task, HeadTask)
    changed = {"learning_rate", "upper_learning_rate", "max_steps", "seed", "retrain_arguments"}
    args = task.args.resume_must_match()
    settings = {
        "model": "head" if head else None,
        "trainer": task.trainer.__name__,
        "frozen_dropout": task.frozen_dropout,
        "adapter": None if head or task.adapter is None else task.adapter.to_dict(),
        "args": {name: value for name, value in args.items() if name not in changed},
        "retrain": task.args.retrain,
        "retrain_arguments": without_sizes(task.args),
        "base_model": task.fingerprint(),
        "options": {name: code_of(value) for name, value in task.options.items()},
        "versions": versions(),
        "train_dataset": data_fingerprint(data.train),
        "upper_dataset": data_fingerprint(data.upper),
        "test_dataset": data_fingerprint(data.test),
        "held_out": data.held_out,
        "folds": data.folds,
        "parts": data.parts or None,
    }
    for name, method in task.methods.items():
        options: Any = fields(method) if is_dataclass(method) else ()
        values = [getattr(method, each.name) for each in options]
        settings[f"method {name}"] = [code_of(type(method)), *values, dict(method.defaults)]
    return settings


def code_of(thing: Any) -> str:
    """The name of a function, a class or a value's class, with a hash of the code of a user."""
    if not callable(thing) or not hasattr(thing, "__qualname__"):
        thing = type(thing)
    name, module = f"{thing.__module__}.{thing.__qualname__}", sys.modules.get(thing.__module__)
    folder = str(getattr(module, "__file__", ""))
    if "site-packages" in folder or thing.__module__.startswith("hyperopt_peft"):
        return name
    with suppress(OSError, TypeError):  # as of a function that was typed in
        name += f" {hashlib.sha256(inspect.getsource(module or thing).encode()).hexdigest()[:12]}"
    return name
