"""The interface of an estimator: options, requirements and cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.dots import Dots
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.utils.validation import require_types


@dataclass(frozen=True)
class Requirements:
    """The data that an estimator requires from training; `BilevelStep` provides them.

    Args:
        history: the number of past lower steps with a `StepRecord`.
        optimizer_state: whether a record has the gradient, and the optimizer's state before the
            step.
        lower_gradient: whether a record has ∂f/∂u from the lower step's own backward pass.
        second_derivatives: whether f is differentiated twice.
        differences: whether gradients at close points are subtracted.
        observe: whether `Estimator.observe` can take the dot products of f from the lower step's
            own pass, if F is differentiated at the same point before that pass.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("cg").requirements.second_derivatives
        True
    """

    history: int = 0
    optimizer_state: bool = False
    lower_gradient: bool = False
    second_derivatives: bool = False
    differences: bool = False
    observe: bool = False


class Estimator(ABC):
    """An estimator of dF/du; a subclass is a frozen dataclass whose fields are the options.

    The constructor checks the options against their type hints, which may include a `Bound`.

    Raises:
        ProblemError: an option has the wrong type or is out of range.

    Example:
        >>> @dataclass(frozen=True)
        ... class Scaled(Estimator):
        ...     factor: float = 1.0
        ...
        ...     def estimate(self, oracle):
        ...         direct = oracle.upper_gradient.direct
        ...         return Estimate(self.factor * direct, 0 * direct)
        >>> Scaled(factor="two")
        Traceback (most recent call last):
        hyperopt_peft.errors.ProblemError: Scaled: factor must be finite float, got 'two'
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        require_types(self, where=f"{self.name or type(self).__name__}: ")

    def require(self, condition: bool, message: str) -> None:
        """Raise ProblemError with the estimator's name and ``message`` unless ``condition``."""
        if not condition:
            raise ProblemError(f"{self.name or type(self).__name__}: {message}")

    @property
    def requirements(self) -> Requirements:
        """The data required from training; none by default."""
        return Requirements()

    def cost(self) -> int | None:
        """The number of passes of one lower and one upper step; None if unknown.

        A pass is one forward and one backward over as many rows as a lower step has. A product of
        second derivatives counts as two passes.
        """
        return None

    def check_levels(self, upper: Problem, lower: Problem) -> None:  # noqa: B027
        """Raise ProblemError if the estimator cannot be used with these levels."""

    def observe(self, oracle: Oracle) -> Dots | None:
        """The dot products to collect in the lower step's pass, which comes next; None for none.

        `estimate` reads them from ``oracle.dots``. The oracle has no lower batch yet.
        """
        return None

    @abstractmethod
    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
