"""The registry of estimators, and their names with options, such as ``"neumann:terms=20"``."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from hyperopt_peft.errors import ProblemError, did_you_mean
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.implicit.function import FunctionSolver, SolverFunction
from hyperopt_peft.utils import plugins
from hyperopt_peft.utils.validation import describe_options

#: An estimator, its name with options, or a function (matvec, b) -> v; see `get_estimator`.
EstimatorLike = str | Estimator | SolverFunction
Kind = Literal["direct", "identity", "implicit", "unrolled", "penalty"]
E = TypeVar("E", bound=type[Estimator])
#: The default estimator. Away from minima a network's Hessian is indefinite, where cg stops and
#: minres does not. No cheaper estimator in docs/comparison.md has smaller errors on all problems.
DEFAULT = "minres"
EstimatorT = TypeVar("EstimatorT", bound=Estimator)


@dataclass(frozen=True)
class Entry:
    """A registered estimator; see `register`."""

    estimator: type[Estimator]
    kind: Kind
    tolerance: float | None


_ENTRIES: dict[str, Entry] = {}
#: The entry points by which other distributions add estimators, under their registered names.
GROUP = "hyperopt_peft.estimators"


def register(name: str, *, kind: Kind, tolerance: float | None = None) -> Callable[[E], E]:
    """Class decorator that registers an `Estimator` as ``name``; its fields are its options.

    Args:
        name: the name, without a colon.
        kind: ``"direct"`` omits the implicit term; ``"identity"`` replaces H⁻¹ by ξI;
            ``"implicit"`` solves with H, so that scaling f has no effect; ``"unrolled"``
            differentiates optimizer steps; ``"penalty"`` descends f + F/λ, with an error of O(1/λ).
        tolerance: the largest relative error on quadratic programs with condition number 10, with
            default options in float64, which tests check; None for a biased estimator. The kinds
            implicit and penalty require it.

    Raises:
        ProblemError: the name is registered already; the kind is unknown; or a required tolerance
            is missing.

    Example:
        >>> @register("example", kind="identity")
        ... class Example(Estimator):
        ...     steps: int = 1
        >>> registered()["example"].kind
        'identity'
    """

    def decorate(estimator: E) -> E:
        other = _ENTRIES.get(name)
        if other is not None and _path(other.estimator) != _path(estimator):
            raise ProblemError(f"{name}: is already registered; choose another name")
        if kind not in get_args(Kind):
            raise ProblemError(f"{name}: kind must be one of {get_args(Kind)}, got {kind!r}")
        if kind in ("implicit", "penalty") and tolerance is None:
            raise ProblemError(f"{name}: an estimator of kind {kind} must declare its tolerance")
        if "__dataclass_params__" not in vars(estimator):
            dataclass(frozen=True)(estimator)  # in place
        describe_options(estimator)
        estimator.name = name
        _ENTRIES[name] = Entry(estimator, kind, tolerance)
        return estimator

    return decorate


def _path(estimator: type) -> tuple[str, str]:
    """The path of a class, which stays the same when a notebook cell runs again."""
    return estimator.__module__, estimator.__qualname__


def registered() -> dict[str, Entry]:
    """All registered estimators by name, those of other distributions too; see `get_estimator`.

    Example:
        >>> registered()["cg"].kind
        'implicit'
    """
    for name in plugins.names(GROUP):
        _entry(name)
    return dict(_ENTRIES)


def _entry(name: str) -> Entry:
    """The estimator ``name``, for which its distribution is imported."""
    if name not in _ENTRIES:
        others = plugins.names(GROUP)
        if name not in others:
            near = did_you_mean(name, sorted({*_ENTRIES, *others}))
            raise ProblemError(f"unknown estimator {name!r}{near}")
        kind = plugins.load(GROUP, name, Estimator)
        if name not in _ENTRIES:
            raise ProblemError(f"{name!r}: {kind.__name__} needs @register({name!r}, kind=…)")
    return _ENTRIES[name]


def get_estimator(estimator: EstimatorLike) -> Estimator:
    """The `Estimator` for a name with options, such as ``"cg:steps=40"``, or for a function.

    The name is a registered one, also of another distribution, or ``path/to/file.py:Class``. A
    function ``(matvec, b) -> v`` becomes a `FunctionSolver`. An estimator is returned unchanged.

    Raises:
        ProblemError: the name or an option is unknown, or a value is invalid.

    Example:
        >>> get_estimator("cg:steps=40,damping=0.1").steps
        40
        >>> get_estimator(lambda matvec, b: 0.1 * b).requirements.second_derivatives
        True
    """
    if isinstance(estimator, Estimator):
        return estimator
    if isinstance(estimator, type):
        raise ProblemError(
            f"hypergradient: got the class {estimator.__name__}; give an instance, "
            f"{estimator.__name__}()"
        )
    if callable(estimator):
        return FunctionSolver(estimator)
    if not isinstance(estimator, str):
        raise ProblemError(
            "hypergradient: must be a name, an Estimator or a function (matvec, b) -> v, got "
            f"{type(estimator).__name__}"
        )
    file, colon, rest = estimator.partition(".py:")
    name, _, text = (rest if colon else estimator).partition(":")
    if colon:
        kind: type[Estimator] = plugins.class_in(f"{file}.py", name, Estimator, "hypergradient")
        return with_options(kind, text)
    return with_options(_entry(name).estimator, text)


def with_options(estimator: type[EstimatorT], text: str) -> EstimatorT:
    """``estimator`` with the options in ``text``, "steps=40,damping=0.1", or ProblemError."""
    name = estimator.name
    names = [option.name for option in dataclasses.fields(estimator)]  # type: ignore[arg-type]
    options = {}
    for part in filter(None, text.split(",")):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ProblemError(f"{name}: write options as option=value, got {part!r}")
        if option not in names:
            raise ProblemError(f"{name}: unknown option {option!r}{did_you_mean(option, names)}")
        if option in options:
            raise ProblemError(f"{name}: option {option!r} is given twice")
        options[option] = _literal(value)
    return estimator(**options)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
