"""Whether a value is of the type that an option's hint names."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hyperopt_peft.errors import ProblemError


def matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` fits ``hint``: a class, a Literal or a union; a whole number is a float."""
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
    """Raise ProblemError unless ``value`` is a whole number from ``least``."""
    if not matches(value, int) or value < least:
        raise ProblemError(f"{name} must be a whole number from {least}, got {value!r}")


def type_name(hint: Any) -> str:
    """``hint`` in the words of an error message."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_name(choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def require_settings(made: str, known: Mapping[str, Any], has: str, now: Mapping[str, Any]) -> None:
    """Raise ProblemError where ``known``, what was ``made`` with, differs from ``now``.

    The first difference is named, with both values, and the others are counted.
    """
    different = [key for key in {**now, **known} if known.get(key) != now.get(key)]
    if different:
        first, *others = different
        more = f" ({len(others)} more settings differ)" if others else ""
        raise ProblemError(
            f"{first}: {made} was made with {known.get(first)!r}, {has} has {now.get(first)!r}"
            f"{more}; resume with the same settings, or start a new run"
        )
