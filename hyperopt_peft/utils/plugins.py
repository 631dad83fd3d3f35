"""Classes that other distributions add by entry points, and classes in a file."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hyperopt_peft.errors import ProblemError, did_you_mean


def names(group: str) -> list[str]:
    """The names of the entry points of ``group``, a class each; none is imported."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: str, name: str, kind: type) -> Any:
    """The subclass of ``kind`` that the entry point ``name`` names, of the first distribution."""
    first, *_ = entry_points(group=group, name=name)
    owner = first.dist.name if first.dist else first.value
    try:
        found = first.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ProblemError(f"{name!r} of {owner} cannot be imported: {reason}") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ProblemError(f"{name!r} of {owner}: {first.value} is no {kind.__name__}; name one")
    return found


def class_in(file: str, name: str, kind: type, option: str) -> Any:
    """The subclass ``name`` of ``kind`` in ``file``; errors name ``option``."""
    every = vars(import_file(file, option))
    known = {k: x for k, x in every.items() if isinstance(x, type) and issubclass(x, kind)}
    if name not in known:
        near = did_you_mean(name, sorted({*known} - {kind.__name__}))
        text = f"{file} has no {kind.__name__} {name!r}; give {file}:Class{near}"
        raise ProblemError(f"{option}: {text}")
    return known[name]


def import_file(path: str, option: str) -> ModuleType:
    """The module in the file ``path``, imported once; errors name ``option``."""
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ProblemError(f"{option}: {path} is no file of Python; give path/to/file.py")
    name = str(file)
    if name not in sys.modules:
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)  # where a dataclass looks its types up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            reason = f"{type(error).__name__}: {error}"
            raise ProblemError(f"{option}: {path} cannot be imported: {reason}") from error
    return sys.modules[name]
