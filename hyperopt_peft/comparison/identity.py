"""What the runs of a comparison depend on: the identity of its task and of its methods."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections import defaultdict
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

from hyperopt_peft.comparison.heads import HeadTask
from hyperopt_peft.comparison.rows import Drawn, Rows
from hyperopt_peft.comparison.store import OF_SEED
from hyperopt_peft.comparison.task import Task, without_sizes
from hyperopt_peft.trainer.fingerprint import data_fingerprint
from hyperopt_peft.utils.versions import versions

#: The arguments that a run sets, or whose order or spelling changes nothing.
SET = {"learning_rate", "upper_learning_rate", "max_steps", "seed", "retrain_arguments"}
#: What a trainer has set in a method.
SET_BY_TRAINER = "_options", "row_losses"
#: The types of values that are settings as they are.
PLAIN = str, int, float, list, tuple, dict, set, frozenset, type(None)


def settings_of(task: Task) -> dict[str, dict[str, Any]]:
    """By the name of a method, the settings on which its runs of ``task`` depend.

    Raises:
        ProblemError: ``base_model`` returns one model again and again.
    """
    data = task.data
    head = task.head if isinstance(task, HeadTask) else None
    shared = {
        "head": None if head is None else asdict(head),
        "trainer": task.trainer.__name__,
        "frozen_dropout": task.frozen_dropout,
        "adapter": None if head or task.adapter is None else task.adapter.to_dict(),
        "args": {k: x for k, x in task.args.resume_must_match().items() if k not in SET},
        "retrain": task.args.retrain,
        "retrain_arguments": without_sizes(task.args),
        "base_model": task.fingerprint(),
        "options": {name: with_values(value) for name, value in task.options.items()},
        "versions": versions(),
        **{f"{name}_dataset": _identity(rows) for name, rows in data.tables().items()},
        "held_out": data.held_out,
        "folds": data.folds,
    }
    return {name: {**shared, "method": _own(method)} for name, method in task.methods.items()}


def rows_of_seeds(data: Rows) -> dict[int, dict[str, Any]]:
    """By seed, the identity of the rows that are its own."""
    found = defaultdict[int, dict[str, Any]](dict)
    for name, rows in data.tables().items():
        for seed in rows.chosen if isinstance(rows, Drawn) else ():
            found[seed][f"{name}_dataset"] = data_fingerprint(rows.of(seed))
    return found


def _identity(rows: Any) -> Any:
    return OF_SEED if isinstance(rows, Drawn) else data_fingerprint(rows)


def _own(method: Any) -> dict[str, Any]:
    """The code of a method and its settings."""
    mine = {k: x for k, x in vars(method).items() if k not in SET_BY_TRAINER}
    options = {k: with_values(x) if callable(x) else x for k, x in mine.items()}
    others = {"defaults": dict(method.defaults), "full_upper_batch": method.full_upper_batch}
    return {"code": code_of(type(method)), **options, **others}


def with_values(thing: Any) -> Any:
    """The `code_of` a callable or an object, and the values that it holds.

    These are the arguments of a partial, the variables around a function, or the attributes of an
    object of the user or of a dataclass, such as a collator: plain values as they are, of others
    the code.
    """
    values: dict[str, Any] = {}
    owner = getattr(thing, "__self__", thing)
    if isinstance(thing, functools.partial):
        values = {"func": thing.func, "args": thing.args, **thing.keywords}
    elif inspect.isfunction(thing):
        values = dict(inspect.getclosurevars(thing).nonlocals)
    elif _is_of_user(type(owner).__module__) or is_dataclass(type(owner)):
        values = getattr(owner, "__dict__", values)
    held = {k: x if isinstance(x, PLAIN) else code_of(x) for k, x in values.items()}
    return [code_of(thing), held] if held else code_of(thing)


def code_of(thing: Any) -> str:
    """The name of a function, a class or a value's class, with a hash of the code of a user.

    The hash is of the files of the user that have it or a base class, and of those that these
    import. An edit beside it counts too; what a function imports itself does not.
    """
    if not callable(thing) or not hasattr(thing, "__qualname__"):
        thing = type(thing)
    module, name = thing.__module__, thing.__qualname__
    files: dict[str, str] = {}
    if not _is_of_user(module):
        return f"{module}.{name}"
    try:
        for each in getattr(thing, "__mro__", [thing]):
            if _is_of_user(each.__module__):
                inspect.getsource(each)
                _collect(each.__module__, files)
        code = "\n".join(sorted(files.values()))
    except (OSError, TypeError, KeyError, SyntaxError):  # no file has it, as in a notebook
        code = Hasher.hash(thing)
    return f"{name} {hashlib.sha256(code.encode()).hexdigest()[:12]}"


def _collect(module: str, files: dict[str, str]) -> None:
    """Add to ``files`` the source of ``module``, and of what of the user it imports at its top."""
    files[module] = inspect.getsource(here := sys.modules[module])
    for node in ast.parse(files[module]).body:
        names = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [x.name for x in node.names]
        if isinstance(node, ast.ImportFrom):
            owner = "." * node.level + (node.module or "")
            owner = importlib.util.resolve_name(owner, here.__package__)
            names = [owner, *(f"{owner}.{x}" for x in names)]
        for name in {*names} - files.keys():
            if getattr(sys.modules.get(name), "__file__", None) and _is_of_user(name):
                _collect(name, files)


def _is_of_user(module: str) -> bool:
    """Whether the code of ``module`` is neither ours, nor Python's, nor installed."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    root = module.partition(".")[0]
    known = {*sys.stdlib_module_names, "hyperopt_peft"}
    return root not in known and not {"site-packages", "dist-packages"} & {*Path(file).parts}
