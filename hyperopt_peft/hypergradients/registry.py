"""Estimators by short name: ``"cg"``, ``"neumann:terms=20"``, or an instance."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.hypergradients.estimator import Estimator

Kind = Literal["direct", "identity", "implicit", "unrolled", "penalty"]
E = TypeVar("E", bound=type[Estimator])
#: Where none is chosen. A network's Hessian is indefinite away from minima, where cg gives up and
#: minres goes on; no cheaper row of docs/comparison.md is closer on all problems.
DEFAULT = "minres"
T = TypeVar("T", bound=Estimator)


@dataclass(frozen=True)
class Entry:
    """A registered estimator: its class, its kind, and how close it must come.

    ``kind``: ``"direct"`` leaves out the implicit term, ``"identity"`` takes H⁻¹ = ξI,
    ``"implicit"`` solves with H (scaling f changes nothing), ``"unrolled"`` differentiates
    the optimizer's steps, ``"penalty"`` adds a share ν of F to f, by first-order passes, with
    an error of O(ν) or O(ν²). ``tolerance`` is the largest relative error, with default options
    in float64, on a quadratic program whose Hessian has condition number 10; None for an
    estimator that is biased by construction. The test-suite holds every entry to them.
    """

    estimator: type[Estimator]
    kind: Kind
    tolerance: float | None


_ENTRIES: dict[str, Entry] = {}


def register(name: str, *, kind: Kind, tolerance: float | None = None) -> Callable[[E], E]:
    """Class decorator that makes an estimator known as ``name``; its fields are its options.

    Raises:
        ProblemError: the name is taken or not a plain word, the kind unknown, or an
            implicit or penalty estimator declares no tolerance.
    """

    def decorate(estimator: E) -> E:
        if not name.isidentifier():
            raise ProblemError(f"an estimator's name must be a plain word, got {name!r}")
        known = _ENTRIES.get(name)
        if known is not None and _path(known.estimator) != _path(estimator):
            raise ProblemError(f"an estimator called {name!r} is already registered")
        if kind not in get_args(Kind):
            raise ProblemError(f"{name}: kind must be one of {get_args(Kind)}, got {kind!r}")
        if kind in ("implicit", "penalty") and tolerance is None:
            raise ProblemError(f"{name}: an estimator of kind {kind} must declare its tolerance")
        if "__dataclass_params__" not in vars(estimator):
            dataclass(frozen=True)(estimator)  # in place
        estimator.name = name
        _ENTRIES[name] = Entry(estimator, kind, tolerance)
        return estimator

    return decorate


def _path(estimator: type) -> tuple[str, str]:
    """What stays the same where a notebook's cell defines an estimator anew."""
    return estimator.__module__, estimator.__qualname__


def registered() -> dict[str, Entry]:
    """All registered estimators by name."""
    return dict(_ENTRIES)


def get_estimator(method: str | Estimator) -> Estimator:
    """The estimator that ``method`` names: ``"cg"``, ``"cg:steps=40,damping=0.1"``, or itself.

    Raises:
        ProblemError: an unknown name or option (with the nearest known one), or a bad value.
    """
    if isinstance(method, Estimator):
        return method
    if not isinstance(method, str):
        raise ProblemError(
            f"a hypergradient method is a name or an Estimator, got {type(method).__name__}"
        )
    name, _, text = method.partition(":")
    if name not in _ENTRIES:
        raise ProblemError(f"unknown estimator {name!r}{did_you_mean(name, list(_ENTRIES))}")
    return with_options(_ENTRIES[name].estimator, text)


def with_options(estimator: type[T], text: str) -> T:
    """``estimator`` with the options of ``text``, ``"steps=40,damping=0.1"``.

    Raises:
        ProblemError: an unknown option (with the nearest known one), or a bad value.
    """
    name = estimator.name
    known = [option.name for option in dataclasses.fields(estimator)]  # type: ignore[arg-type]
    options = {}
    for part in filter(None, text.split(",")):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ProblemError(f"{name}: write options as option=value, got {part!r}")
        if option not in known:
            raise ProblemError(f"{name}: unknown option {option!r}{did_you_mean(option, known)}")
        if option in options:
            raise ProblemError(f"{name}: option {option!r} is given twice")
        options[option] = _literal(value)
    return estimator(**options)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
