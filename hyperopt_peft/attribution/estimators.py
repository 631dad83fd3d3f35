"""Estimators that give a score for each training row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.implicit.solver import Solver
from hyperopt_peft.hypergradients.registry import get_estimator, with_options
from hyperopt_peft.hypergradients.unrolled.darts import DARTS
from hyperopt_peft.hypergradients.unrolled.direct import Direct
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled

#: A head's estimator: conjugate gradients with exact products, to a relative residual of 1e-6.
HEAD_ESTIMATOR = "cg:steps=2000,tolerance=1e-6"


@dataclass(frozen=True)
class ScoreEstimator:
    """An estimator, its name, and the number of last steps that it differentiates; None for all."""

    estimator: Estimator
    name: str
    last_steps: int | None = None

    @property
    def differentiates_run(self) -> bool:
        """Whether steps of the run are differentiated."""
        return isinstance(self.estimator, Unrolled)


def parse_estimator(estimator: str | Estimator) -> ScoreEstimator:
    """The estimator with the name ``estimator``; ProblemError if it cannot score rows."""
    name = estimator if isinstance(estimator, str) else repr(estimator)
    kind, _, options = name.partition(":")
    if kind == "gradient":  # the identity in place of the inverse Hessian, as in one step
        return ScoreEstimator(with_options(DARTS, options), name)
    parsed = get_estimator(estimator)
    if type(parsed) is Unrolled:
        truncated = parsed.steps > 1 or "steps=" in options
        return ScoreEstimator(parsed, name, parsed.steps if truncated else None)
    if not isinstance(parsed, Solver):
        raise ProblemError(
            f"estimator: {parsed.name} gives no score for each row; choose unrolled (the whole "
            "run), an implicit solver such as minres, nystrom or cg, or gradient"
        )
    return ScoreEstimator(parsed, name)


def require_known_derivative(training: Any, differentiates_run: bool = True) -> None:
    """Raise ProblemError if the derivative of a bilevel run is not known."""
    if not differentiates_run:
        raise ProblemError(
            "estimator: a bilevel run does not end at the minimum of a single loss; choose unrolled"
        )
    if not isinstance(training.estimator, Direct):
        raise ProblemError(
            f"hypergradient: the derivative of {training.estimator.name} is not known; give a "
            'bilevel run hypergradient="direct", or attribute the training of one level'
        )
