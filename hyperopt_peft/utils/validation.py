"""Checks of option values against type hints, and of settings against saved ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hyperopt_peft.errors import ProblemError


def matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``: a class, a Literal or a union of these.

    An int is accepted as a float; a bool is accepted neither as an int nor as a float.

    Example:
        >>> matches(3, float | None), matches(True, int), matches("cg", Literal["cg", "minres"])
        (True, False, True)
    """
    if get_origin(hint) in (Union, UnionType):
        return any(matches(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def require_count(name: str, value: Any, *, least: int) -> None:
    """Raise ProblemError unless ``value`` is an int ≥ ``least``.

    Example:
        >>> require_count("steps", -1, least=0)
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: steps: must be a whole number from 0, got -1
    """
    if not matches(value, int) or value < least:
        raise ProblemError(f"{name}: must be a whole number from {least}, got {value!r}")


def type_name(hint: Any) -> str:
    """The type ``hint`` as an error message names it.

    Example:
        >>> type_name(int | None), type_name(Literal["cg", "minres"])
        ('int or None', "'cg' or 'minres'")
    """
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_name(choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def require_settings(made: str, known: Mapping[str, Any], has: str, now: Mapping[str, Any]) -> None:
    """Raise ProblemError where saved settings differ from current ones.

    The message has the name and both values of the first difference, however deep in lists and
    mappings, and the number of others.

    Args:
        made: the name of the saved object in the message.
        known: the settings of the saved object.
        has: the name of the current object in the message.
        now: the settings of the current object.

    Example:
        >>> require_settings("the state", {"a": [2, 8]}, "this run", {"a": [4, 8]})
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: a[0]: the state was made with 2, this run has 4; ...
    """
    if found := list(_differences("", known, now)):
        (name, before, after), *others = found
        more = f" ({len(others)} more settings differ)" if others else ""
        raise ProblemError(
            f"{name}: {made} was made with {_short(before)}, {has} has {_short(after)}{more}; "
            "resume with the same settings, or start a new run"
        )


def _differences(name: str, known: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The entries in which two nests of mappings and lists differ, with both values."""
    if isinstance(known, Mapping) and isinstance(now, Mapping):
        for key in {**now, **known}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(inner, known.get(key), now.get(key))
    elif isinstance(known, list) and isinstance(now, list) and len(known) == len(now):
        for position, (before, after) in enumerate(zip(known, now)):
            yield from _differences(f"{name}[{position}]", before, after)
    elif known != now:
        yield name, known, now


def _short(value: Any, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
