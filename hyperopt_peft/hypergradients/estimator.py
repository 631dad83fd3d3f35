"""What an estimator is: an implicit one is a `Solver` times a product."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, get_type_hints

from hyperopt_peft.core.optimizer import read_by_options
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.oracle import Oracle, State
from hyperopt_peft.utils.validation import matches, spelt
from hyperopt_peft.utils.vector import Vector


@dataclass(frozen=True)
class Estimate:
    """A hypergradient: ``direct`` is ∂F/∂u, ``implicit`` the second term with its sign.

    ``state`` is what the estimator finds in the oracle at the next upper step of a run.
    """

    direct: Vector
    implicit: Vector
    residual: float | None = None
    steps: int | None = None
    note: str = ""
    state: State = field(default_factory=dict)

    @property
    def hypergradient(self) -> Vector:
        """dF/du = direct + implicit, shaped like the upper variables."""
        return self.direct + self.implicit

    @property
    def implicit_ratio(self) -> float:
        """‖implicit‖/‖direct‖; infinite where F does not read u itself."""
        direct, implicit = self.direct.norm(), self.implicit.norm()
        return implicit / direct if direct else (float("inf") if implicit else 0.0)


class Estimator(ABC):
    """A way to estimate dF/du; a subclass is a frozen dataclass whose fields are its options.

    Options are checked against their type hints at construction, then by ``check``.

    Raises:
        ProblemError: an option of the wrong type or out of range.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            if not matches(value, hints[option.name]):
                self.require(
                    False, f"{option.name} must be {spelt(hints[option.name])}, got {value!r}"
                )
        self.check()

    def require(self, condition: bool, message: str) -> None:
        """Raise ProblemError with ``message`` under the estimator's name unless ``condition``."""
        if not condition:
            raise ProblemError(f"{self.name or type(self).__name__}: {message}")

    def check(self) -> None:  # noqa: B027 - an estimator without options has no ranges
        """Check the ranges of the options."""

    @property
    def history(self) -> int:
        """How many of the last lower steps the estimator looks back on."""
        return 0

    @property
    def reuses_lower_gradient(self) -> bool:
        """Whether ∂f/∂u, taken in the lower step's own backward pass, saves a pass later."""
        return False

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether the lower steps it looks back on must hold the optimizer's state."""
        return False

    @property
    def upper_share(self) -> float:
        """The lower steps of a run descend f + upper_share·F, F on the upper level's next batch."""
        return 0.0

    @property
    def needs_every_step(self) -> bool:
        """Whether no lower step may come between those it looks back on."""
        return False

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
