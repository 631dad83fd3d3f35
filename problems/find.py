"""Methods by name, as the command line and comparisons have them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from hyperopt_peft import problems
from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.problems import METHODS
from hyperopt_peft.trainer.method import Method


def find_method(spec: str) -> type[Method]:
    """The class of the method ``spec``: a name of `METHODS`, or ``path/to/file.py:Class``.

    Raises:
        ProblemError: an unknown name, a file that cannot be imported, or no `Method` in the file.

    Example:
        >>> find_method("bidora")(gamma=1e-5)
        BiDoRA(gamma=1e-05, norm_grad='full', fast_dora=True, paper=False)
        >>> find_method("bidorra")
        Traceback (most recent call last):
        ...
        hyperopt_peft.errors.ProblemError: method: unknown 'bidorra'; did you mean 'bidora'?
    """
    path, colon, name = f"{spec}{':' * spec.endswith('.py')}".rpartition(":")
    if not colon:
        if spec not in METHODS:
            raise ProblemError(f"method: unknown {spec!r}{did_you_mean(spec, METHODS)}")
        found: type[Method] = getattr(problems, METHODS[spec][1])
        return found
    every = vars(import_file(path, "method"))
    known = {k: x for k, x in every.items() if isinstance(x, type) and issubclass(x, Method)}
    if name not in known:
        near = did_you_mean(name, sorted({*known} - {"Method"}))
        raise ProblemError(f"method: {path} has no Method {name!r}; give {path}:Class{near}")
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
