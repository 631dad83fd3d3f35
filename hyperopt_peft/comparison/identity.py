"""What the runs of a comparison depend on: the identity of its task and of its methods."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from datasets.fingerprint import Hasher

from hyperopt_peft.comparison.heads import HeadTask
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
        "options": {name: with_values(value) for name, value in task.options.items()},
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
        mine = {k: x for k, x in vars(method).items() if k not in SET_BY_TRAINER}
        options = {k: with_values(x) if callable(x) else x for k, x in mine.items()}
        options |= {"defaults": dict(method.defaults), "full_upper_batch": method.full_upper_batch}
        own[name] = {"code": code_of(type(method)), **options}
    return {name: {**shared, "method": each} for name, each in own.items()}


def with_values(thing: Any) -> Any:
    """The `code_of` a callable or an object, and the values that it holds.

    These are the arguments of a partial, the variables around a function, or the attributes of an
    object of the user or of a dataclass, such as a collator: plain values as they are, of others
    the code.
    """
    values, owner = dict[str, Any](), getattr(thing, "__self__", thing)
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

    The hash is of the statements that define it, and of those that define all that these name, in
    each file of the user: base classes and helpers count, and other methods of a file do not. What
    a function imports itself does not count.
    """
    if not callable(thing) or not hasattr(thing, "__qualname__"):
        thing = type(thing)
    module, name, found = thing.__module__, thing.__qualname__, dict[Any, str]()
    if not _is_of_user(module):
        return f"{module}.{name}"
    try:
        if "<" in name:  # within a function, whose other statements do not count
            text = textwrap.dedent(inspect.getsource(thing))
            for _, read, found[name] in _statements(text):
                _collect(module, read, found)
        else:
            _collect(module, {name.partition(".")[0]}, found)
    except SyntaxError:  # a lambda within a call
        found[name] = text
    except (OSError, TypeError, KeyError):  # no file or no module
        found.clear()
    if not any(found.values()):  # no file has it, as in a notebook
        found[name] = Hasher.hash(thing)
    code = "\n".join(found[key] for key in sorted(found))
    return f"{name} {hashlib.sha256(code.encode()).hexdigest()[:12]}"


def _collect(module: str, names: Iterable[str], found: dict[Any, str]) -> None:
    """Add to ``found`` the code of ``names`` of ``module``, and of all that it reads."""
    here = sys.modules[module]
    statements = _statements(inspect.getsource(here))
    for name in {*names}:
        if (key := f"{module} {name}") in found:
            continue
        mine, value = [x for x in statements if name in x[0]], vars(here).get(name)
        found[key] = "\n".join(text for *_, text in mine)
        for _, read, _ in mine:
            _collect(module, read, found)
        owner: str | None
        inside: Iterable[str]
        if isinstance(value, ModuleType):
            owner, inside = value.__name__, vars(value)
        else:
            owner = getattr(value, "__module__", None)
            inside = getattr(value, "__qualname__", type(value).__qualname__).split(".")[:1]
        if owner is None and found[key].startswith("from "):
            found[key] += repr(value)  # a number of another file
        elif owner is not None and owner != module and _is_of_user(owner):
            _collect(owner, inside, found)


@functools.lru_cache
def _statements(source: str) -> list[tuple[set[str], set[str], str]]:
    """For each statement of ``source``, the names that it binds, those that it reads, its text."""
    statements = []
    for node in ast.parse(source).body:
        codes, bound, read = [compile(ast.Module([node], []), "", "exec")], set(), set()
        for code in codes:
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
            steps = [*dis.get_instructions(code)]
            read |= {x.argval for x in steps if x.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
            bound |= {x.argval for x in steps if x.opname == "STORE_NAME" and code is codes[0]}
        for changed in getattr(node, "targets", [node]):  # as Mine.x = 3 and TABLE.update(x=3)
            while inner := getattr(changed, "func", getattr(changed, "value", None)):
                changed = inner
            bound |= {getattr(changed, "id", "")}
        statements.append((bound, read, ast.unparse(node)))
    return statements


def _is_of_user(module: str) -> bool:
    """Whether the code of ``module`` is neither ours, nor Python's, nor installed."""
    file, root = getattr(sys.modules.get(module), "__file__", None) or "", module.partition(".")[0]
    known = {*sys.stdlib_module_names, "hyperopt_peft"}
    return root not in known and not {"site-packages", "dist-packages"} & {*Path(file).parts}
