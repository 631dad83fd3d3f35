"""Checks of option values against type hints, and of settings against saved settings."""

from __future__ import annotations

import inspect
import math
import operator
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hyperopt_peft.errors import ProblemError

_COMPARISONS = {"≥": operator.ge, ">": operator.gt, "≤": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Bound:
    """A bound of a number, for a type hint: ``Annotated[int, Bound("≥", 1)]``.

    Example:
        >>> matches(0, Annotated[int, Bound("≥", 1)]), matches(0.5, Fraction)
        (False, True)
    """

    sign: Literal["≥", ">", "≤", "<"]
    number: float

    def __str__(self) -> str:
        return f"{self.sign} {self.number:g}"


PositiveInt = Annotated[int, Bound("≥", 1)]
NonNegativeInt = Annotated[int, Bound("≥", 0)]
PositiveFloat = Annotated[float, Bound(">", 0)]
NonNegativeFloat = Annotated[float, Bound("≥", 0)]
Fraction = Annotated[float, Bound("≥", 0), Bound("<", 1)]
Share = Annotated[float, Bound(">", 0), Bound("≤", 1)]


def option(default: Any = MISSING, *, help: str, **settings: Any) -> Any:
    """The field of a dataclass, with the option's ``help`` for docstring and command line.

    ``settings`` are those of `dataclasses.field`, such as ``default_factory``.

    Example:
        >>> @dataclass
        ... class Decay:
        ...     start: float = option(-6.0, help="u at first")
        >>> Decay().start
        -6.0
    """
    return field(default=default, metadata={"help": help}, **settings)


def describe_options(kind: type) -> None:
    """Add the section ``Args`` to the docstring of ``kind``, from the ``help`` of its `option`s."""
    text = inspect.cleandoc(vars(kind).get("__doc__") or "")
    own = {n: x for n, x in vars(kind).items() if isinstance(x, Field)}  # before @dataclass
    known: dict[str, Field[Any]] = {**getattr(kind, "__dataclass_fields__", {}), **own}
    helps = {name: each.metadata.get("help") for name, each in known.items()}
    described = (f"    {name}: {help}." for name, help in helps.items() if help)
    lines = [textwrap.fill(x, 96, subsequent_indent=" " * 8) for x in described]
    if text and lines and "\nArgs:" not in text:
        before, heading, rest = re.split(r"(\n(?:Raises|Example):|\Z)", text, maxsplit=1)
        kind.__doc__ = "\n".join([before.rstrip(), "", "Args:", *lines, heading + rest])


def matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type ``hint``: a class, a Literal or a union, with `Bound`s.

    An int is accepted as a float; a bool is accepted neither as an int nor as a float. A float must
    be finite.

    Example:
        >>> matches(3, float | None), matches(True, int), matches("cg", Literal["cg", "minres"])
        (True, False, True)
    """
    if get_origin(hint) is Annotated:
        kind, *bounds = get_args(hint)
        within = (_COMPARISONS[bound.sign](value, bound.number) for bound in bounds)
        return matches(value, kind) and all(within)
    if get_origin(hint) in (Union, UnionType):
        return any(matches(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, get_origin(hint) or hint)


@cache  # since evaluating type hints takes as long as a small network's pass
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def require_types(
    options: Any, names: Iterable[str] | None = None, where: str = "", **hints: Any
) -> None:
    """Raise ProblemError unless the fields of the dataclass ``options`` match their type hints.

    ``names`` are the fields to look at, by default all. ``hints`` replace those of the class. The
    message begins with ``where``.

    Example:
        >>> require_types(Bound("≥", "one"))
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: number must be finite float, got 'one'
    """
    kind: Any = type(options)
    hints = _hints(kind) | hints
    for name in [each.name for each in fields(options)] if names is None else names:
        if not matches(value := getattr(options, name), hints[name]):
            raise ProblemError(f"{where}{name} must be {type_name(hints[name])}, got {value!r}")


def require_count(name: str, value: Any, *, least: int) -> None:
    """Raise ProblemError unless ``value`` is an int ≥ ``least``.

    Example:
        >>> require_count("steps", -1, least=0)
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: steps: must be a whole number from 0, got -1
    """
    if not matches(value, int) or value < least:
        raise ProblemError(f"{name}: must be a whole number from {least}, got {value!r}")


def require_writable(folder: Path) -> None:
    """Raise ProblemError unless ``folder``, an ``output_dir``, can be written or created."""
    parents = (folder, *folder.absolute().parents)
    existing = next(parent for parent in parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ProblemError(f"output_dir: {existing} is not a writable folder; name another")


def type_name(hint: Any) -> str:
    """The name of the type ``hint`` in error messages.

    Example:
        >>> type_name(PositiveInt | None), type_name(Literal["cg", "minres"])
        ('int ≥ 1 or None', "'cg' or 'minres'")
    """
    if get_origin(hint) is Annotated:
        kind, *bounds = get_args(hint)
        return f"{type_name(kind)} {' and '.join(map(str, bounds))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_name(choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if hint is float:
        return "finite float"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def require_settings(
    old: str, saved: Mapping[str, Any], new: str, current: Mapping[str, Any]
) -> None:
    """Raise ProblemError if two settings, ``saved`` and ``current``, differ.

    The message has the name and both values of the first difference, at any depth of lists and
    mappings, and the number of other differences.
    """
    if found := list(differences(saved, current)):
        (name, before, after), *others = found
        more = f" ({len(others)} more settings differ)" if others else ""
        raise ProblemError(
            f"{name}: {old} was made with {shortened(before)}, {new} has {shortened(after)}{more}; "
            "resume with the same settings, or start a new run"
        )


def differences(saved: object, current: object, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The entries in which two nested mappings or lists differ, each with its name and both values.

    Example:
        >>> [*differences({"rates": [1, 2], "seed": 0}, {"rates": [1, 3], "seed": 0})]
        [('rates[1]', 2, 3)]
    """
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in {**current, **saved}:
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(saved.get(key), current.get(key), inner)
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        for position, (before, after) in enumerate(zip(saved, current)):
            yield from differences(before, after, f"{name}[{position}]")
    elif saved != current:
        yield name, saved, current


def shortened(value: object) -> str:
    """The text of ``value``, of at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
