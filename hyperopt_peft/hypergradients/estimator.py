"""What an estimator is: an implicit one is a `Solver` times a product."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, get_type_hints

from hyperopt_peft.core.optimizer import read_by_options
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.oracle import Oracle, State
from hyperopt_peft.utils.validation import matches, type_name
from hyperopt_peft.utils.vector import Vector

_hints = cache(get_type_hints)  # evaluating them takes as long as a small network's pass


@dataclass(frozen=True)
class Estimate:
    """A hypergradient: ``direct`` is ∂F/∂u, ``implicit`` the second term with its sign.

    ``state`` is what the estimator finds in the oracle at the next upper step of a run. ``norms``
    are the 2-norms of dF/du, ``direct`` and ``implicit``, as `estimate` reads them.
    """

    direct: Vector
    implicit: Vector
    residual: float | None = None
    steps: int | None = None
    note: str = ""
    state: State = field(default_factory=dict)
    norms: tuple[float, float, float] | None = None

    @property
    def hypergradient(self) -> Vector:
        """dF/du = direct + implicit, shaped like the upper variables."""
        return self.direct + self.implicit

    @property
    def implicit_ratio(self) -> float:
        """‖implicit‖/‖direct‖; infinite where F does not read u itself."""
        _, direct, implicit = self.norms or (0.0, self.direct.norm(), self.implicit.norm())
        return implicit / direct if direct else (float("inf") if implicit else 0.0)


@dataclass(frozen=True)
class Requirements:
    """What an estimator needs of the run around it, which `BilevelStep` provides.

    Args:
        history: how many of the last lower steps the estimator looks back on.
        optimizer_state: whether the `StepRecord` of each holds the gradient and the optimizer's
            state before the step.
        lower_gradient: whether it holds ∂f/∂u of the lower step's own backward pass, which
            saves a pass later.
        upper_weight: lower steps descend f + upper_weight·F, with F on the upper level's next
            batch.
        every_step: whether no lower step may come between those that are looked back on.
        second_derivatives: whether f is differentiated twice.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("cg").requirements.second_derivatives
        True
    """

    history: int = 0
    optimizer_state: bool = False
    lower_gradient: bool = False
    upper_weight: float = 0.0
    every_step: bool = False
    second_derivatives: bool = False


@dataclass(frozen=True)
class Cost:
    """What one upper step costs, the lower steps that the estimator needs before it included.

    Args:
        losses: how often F or f is evaluated.
        backward_passes: passes through autograd, first and second ones.
        vectors: how many vectors shaped like w are held at once, beside w and its gradient.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("direct").cost()
        Cost(losses=2, backward_passes=2, vectors=2)
    """

    losses: int
    backward_passes: int
    vectors: int


class Estimator(ABC):
    """A way to estimate dF/du; a subclass is a frozen dataclass whose fields are its options.

    Options are checked against their type hints at construction, then by ``check``.

    Raises:
        ProblemError: an option of the wrong type or out of range.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            if not matches(value, hints[option.name]):
                self.require(
                    False, f"{option.name} must be {type_name(hints[option.name])}, got {value!r}"
                )
        self.check()

    def require(self, condition: bool, message: str) -> None:
        """Raise ProblemError with ``message`` under the estimator's name unless ``condition``."""
        if not condition:
            raise ProblemError(f"{self.name or type(self).__name__}: {message}")

    def check(self) -> None:  # noqa: B027 - an estimator without options has no ranges
        """Check the ranges of the options."""

    @property
    def requirements(self) -> Requirements:
        """What the estimator needs of the run; nothing by default."""
        return Requirements()

    def cost(self) -> Cost | None:
        """What one upper step of a run costs; None where the estimator does not say."""
        return None

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError where the estimator does not go with these levels.

        Most see the lower loss alone, and refuse a lower level whose `Problem.optimizer_options`
        are functions of upper variables.
        """
        read = read_by_options(lower)
        names = [n for n, u in zip(upper.names, upper.variables, strict=True) if id(u) in read]
        self.require(
            not names,
            f"{lower.name}'s optimizer_options read {', '.join(names)}, which this estimator does "
            'not see; choose one that differentiates the optimizer\'s steps, "unrolled" or '
            '"forward"',
        )

    @abstractmethod
    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
