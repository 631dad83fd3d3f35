"""What the runs of a comparison depend on: the identity of its task and of its methods."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from hyperopt_peft.comparison.heads import HeadTask
from hyperopt_peft.comparison.rows import Drawn, Rows
from hyperopt_peft.comparison.store import ANEW, OF_SEED
from hyperopt_peft.comparison.task import Task, without_sizes
from hyperopt_peft.trainer.contents import NoContentsError, contents_of
from hyperopt_peft.trainer.fingerprint import data_fingerprint
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.utils.versions import versions

#: The arguments that a run sets, or whose order or spelling changes nothing.
SET = {"learning_rate", "upper_learning_rate", "max_steps", "seed", "retrain_arguments"}
#: What a trainer has set in a method.
SET_BY_TRAINER = "_options", "row_losses"


def settings_of(task: Task) -> dict[str, dict[str, Any]]:
    """By the name of a method, the settings on which its runs of ``task`` depend, as JSON.

    Where something has no contents, such as a lock, they say so, and are those of this call alone.

    Raises:
        ProblemError: ``base_model`` returns one model again and again.
    """
    data = task.data
    head = task.head if isinstance(task, HeadTask) else None
    shared = {
        "head": None if head is None else asdict(head),
        "trainer": task.trainer,
        "frozen_dropout": task.frozen_dropout,
        "adapter": None if head else task.adapter,
        "args": {k: x for k, x in task.args.resume_must_match().items() if k not in SET},
        "retrain": task.args.retrain,
        "retrain_arguments": without_sizes(task.args),
        "options": dict(task.options),
        "versions": versions(),
        **{f"{name}_dataset": _identity(rows) for name, rows in data.tables().items()},
        "held_out": data.held_out,
        "folds": data.folds,
    }
    every = {name: _read(contents_of, value, name) for name, value in shared.items()}
    every["base_model"] = _read(task.fingerprint)
    return {
        name: {**every, "method": _read(contents_of, _own(method), f"methods.{name}")}
        for name, method in task.methods.items()
    }


def rows_of_seeds(data: Rows) -> dict[int, dict[str, Any]]:
    """By seed, the identity of the rows that are its own."""
    found = defaultdict[int, dict[str, Any]](dict)
    for name, rows in data.tables().items():
        for seed in rows.chosen if isinstance(rows, Drawn) else ():
            found[seed][f"{name}_dataset"] = data_fingerprint(rows.of(seed))
    return found


def _identity(rows: Any) -> Any:
    return OF_SEED if isinstance(rows, Drawn) else data_fingerprint(rows)


def _own(method: Method) -> Method:
    """``method`` as the user made it."""
    method = copy.copy(method)
    for name in SET_BY_TRAINER:
        vars(method).pop(name, None)
    return method


def _read(read: Callable[..., Any], *args: Any) -> Any:
    """What ``read`` returns; if there are no contents, the reason, with a number of this call."""
    try:
        return read(*args)
    except NoContentsError as error:
        return {ANEW: str(error), "call": uuid4().hex}
