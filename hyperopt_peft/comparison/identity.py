"""What the runs of a comparison depend on: the identity of its task and of its methods."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher

from hyperopt_peft.comparison.heads import HeadTask
from hyperopt_peft.comparison.task import Task, without_sizes
from hyperopt_peft.trainer.fingerprint import data_fingerprint
from hyperopt_peft.trainer.method import Method
from hyperopt_peft.utils.versions import versions

#: The arguments that a run sets, or whose order or spelling changes nothing.
SET = {"learning_rate", "upper_learning_rate", "max_steps", "seed", "retrain_arguments"}


def settings_of(task: Task) -> dict[str, dict[str, Any]]:
    """By the name of a method, the settings on which its runs of ``task`` depend.

    Raises:
        ProblemError: ``base_model`` returns one model again and again.
    """
    data, head = task.data, task.head if isinstance(task, HeadTask) else None
    shared = {
        "head": None if head is None else asdict(head),
        "trainer": task.trainer.__name__,
        "frozen_dropout": task.frozen_dropout,
        "adapter": None if head or task.adapter is None else task.adapter.to_dict(),
        "args": {k: x for k, x in task.args.resume_must_match().items() if k not in SET},
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
    own = {}
    for name, method in task.methods.items():
        options = {k: code_of(x) if callable(x) else x for k, x in vars(method).items()}
        own[name] = {"code": code_of(type(method)), **options, "defaults": dict(method.defaults)}
    return {name: {**shared, "method": each} for name, each in own.items()}


def code_of(thing: Any) -> str:
    """The name of a function, a class or a value's class, with a hash of the user's code.

    Its own code counts, and that of its module and of the user's modules that these import, but for
    the other methods of a file.
    """
    if not callable(thing) or not hasattr(thing, "__qualname__"):
        thing = type(thing)
    name, classes = thing.__qualname__, getattr(thing, "__mro__", ())
    texts, modules = [], [thing.__module__, *(each.__module__ for each in classes)]
    own = {(each.__module__, each.__qualname__) for each in classes}
    for module in filter(_is_of_user, modules):  # to which this adds what they import
        try:
            here, text = sys.modules[module], inspect.getsource(sys.modules[module])
            for node in ast.walk(ast.parse(text)):
                names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    source = "." * node.level + (node.module or "")
                    names = [importlib.util.resolve_name(source, here.__package__)]
                modules += {*names} & {*sys.modules} - {*modules}
            for each in filter(inspect.isclass, vars(here).values()):
                other = each.__module__ == module and (module, each.__qualname__) not in own
                if other and issubclass(each, Method):
                    text = text.replace(inspect.getsource(each), "")
            texts.append(ast.unparse(ast.parse(text)))  # without remarks
        except (OSError, TypeError):  # no file, as in a notebook
            texts.append(Hasher.hash(thing))
    if not texts:
        return f"{thing.__module__}.{name}"
    with suppress(OSError, TypeError):
        texts.append(inspect.getsource(thing) if "<locals>" in name else "")
    return f"{name} {hashlib.sha256(repr(sorted({*texts})).encode()).hexdigest()[:12]}"


def _is_of_user(module: str) -> bool:
    """Whether the code of ``module`` is neither ours, nor Python's, nor installed."""
    file, root = getattr(sys.modules.get(module), "__file__", None) or "", module.partition(".")[0]
    known = {*sys.stdlib_module_names, "hyperopt_peft"}
    return root not in known and not {"site-packages", "dist-packages"} & {*Path(file).parts}
