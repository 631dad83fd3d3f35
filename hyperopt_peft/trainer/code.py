"""The code of the user's functions and classes, and what they read beside their arguments."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import importlib.util
import inspect
import operator
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any


def parts_of(thing: FunctionType | type) -> dict[str, Any]:
    """The code of a function or a class, and the values that it holds.

    Of a function these are the variables around it, its defaults, its attributes and, if it is the
    user's, the globals that it reads; of a class its bases, its methods and, if it is the user's,
    its other attributes. Words of Python's, which no variable has, name what is no variable.

    Example:
        >>> scaled = lambda scale: lambda x: scale * x
        >>> parts_of(scaled(2.0))["scale"]
        2.0
    """
    if isinstance(thing, type):
        of_user = is_of_user(thing.__module__)
        members = {
            name: value
            for name, value in vars(thing).items()
            if isinstance(value, FunctionType)
            or (of_user and name[:2] != "__" and name != "_abc_impl")
        }
        others = {"class": name_of(thing), "import": sys.modules.get(thing.__module__)}
        return {**members, **others, "from": thing.__bases__}
    code, around = thing.__code__, dict[str, Any]()
    module = thing.__globals__.get("__name__", "")
    if is_of_user(module):
        read = {name: thing.__globals__.get(name) for name in _globals_of(code)}
        around = {name: x for name, x in read.items() if not isinstance(x, ModuleType)}
    for name, cell in zip(code.co_freevars, thing.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable without a value yet
            around[name] = cell.cell_contents
    held = [thing.__defaults__, thing.__kwdefaults__, vars(thing)]
    of_code = {"def": name_of(thing), "is": code, "import": sys.modules.get(module)}
    return {**around, **of_code, "with": held}


def name_of(thing: Any) -> str:
    """The name of a function or a class; the version too where an installed package has it.

    Example:
        >>> name_of(len)
        'builtins.len'
    """
    module, name = thing.__module__ or "", thing.__qualname__
    if is_of_user(module):  # whose file may be elsewhere
        return str(name)
    packages = _packages().get(module.partition(".")[0], [])
    return " ".join([f"{module}.{name}", *sorted({f"{x} {version(x)}" for x in packages})])


def is_installed(thing: FunctionType | type) -> bool:
    """Whether a function or a class is that of its name in Python or an installed package.

    What is made while a program runs, such as a function within another, is not.

    Example:
        >>> is_installed(Path), is_installed(lambda: 1)
        (True, False)
    """
    module, root = sys.modules.get(thing.__module__), thing.__module__.partition(".")[0]
    if isinstance(thing, type) and root in sys.stdlib_module_names:  # some have a false name
        return True
    try:
        found = operator.attrgetter(thing.__qualname__)(module)
    except AttributeError:
        return False
    return found is thing and not is_of_user(thing.__module__)


def files_of(module: ModuleType) -> str:
    """A hash of the file of the user's ``module``, and of those that it imports at its top.

    An edit beside a function counts too; what a function imports itself does not. Of a module that
    is not the user's it is the name.
    """
    if not is_of_user(module.__name__):
        return module.__name__
    files: dict[str, str] = {}
    _collect(module.__name__, files)
    return hashlib.sha256("\n".join(sorted(files.values())).encode()).hexdigest()[:12]


def _collect(module: str, files: dict[str, str]) -> None:
    here = sys.modules.get(module)
    if here is None or module in files or not is_of_user(module):
        return
    with suppress(OSError, TypeError, SyntaxError, ImportError):  # no file has it, as in a notebook
        files[module] = inspect.getsource(here)
        for name in _imported(files[module], here.__package__):
            _collect(name, files)


@functools.lru_cache(maxsize=1000)
def _imported(text: str, package: str | None) -> set[str]:
    """The modules, and names of modules, that the top of a file imports."""
    found = set[str]()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        if isinstance(node, ast.ImportFrom):
            owner = "." * node.level + (node.module or "")
            owner = importlib.util.resolve_name(owner, package)
            found |= {owner, *(f"{owner}.{each.name}" for each in node.names)}
    return found


def _globals_of(code: CodeType) -> set[str]:
    """The names of globals that ``code`` and the functions in it read."""
    found = {
        each.argval
        for each in dis.get_instructions(code)
        if each.opname.startswith("LOAD_") and each.opname.endswith(("GLOBAL", "GLOBALS", "NAME"))
    }
    return found.union(*(_globals_of(x) for x in code.co_consts if isinstance(x, CodeType)))


@functools.cache
def _packages() -> Mapping[str, list[str]]:
    return packages_distributions()


def is_of_user(module: str) -> bool:
    """Whether the code of ``module`` is neither ours, nor Python's, nor installed."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    known = {*sys.stdlib_module_names, "hyperopt_peft"}
    installed = {"site-packages", "dist-packages"} & {*Path(file).parts}
    return module.partition(".")[0] not in known and not installed
