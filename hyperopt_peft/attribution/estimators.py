"""Which estimators give a score for each row."""

from __future__ import annotations

from dataclasses import dataclass, field

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Estimator
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.registry import get_estimator, with_options
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from hyperopt_peft.utils.vector import Vector

#: Of a head at its minimum: conjugate gradients with exact products to a relative residual of 1e-6.
HEAD_ESTIMATOR = "cg:steps=2000,tolerance=1e-6"


@dataclass(frozen=True)
class IdentitySolver(Solver):
    """``gradient``: s_i = −⟨∂Φ/∂w, ∂ℓ_i/∂w⟩/n at the end of the run, with the identity for H.

    The products with all rows' gradients are one difference of the rows' losses along ∂Φ/∂w, by
    two forward passes over the training rows.

    Example:
        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> one = hypergradient(upper, lower, IdentitySolver(product="exact"))[0]
        >>> one.allclose(hypergradient(upper, lower, "darts:xi=1")[0])
        True
    """

    product: ProductKind = field(default="difference", kw_only=True)
    name = "gradient"

    def cost(self) -> int | None:
        """Of one upper step: F, and the difference along ∂F/∂w."""
        return self.products_cost(0)

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """b itself."""
        return Solution(b)


@dataclass(frozen=True)
class ScoreEstimator:
    """An estimator, how the user named it, and, of a run's steps, how many last ones.

    ``last_steps`` is None where all steps are differentiated.
    """

    estimator: Estimator
    name: str
    last_steps: int | None = None

    @property
    def differentiates_run(self) -> bool:
        """Whether steps of the run are differentiated."""
        return isinstance(self.estimator, Unrolled)


def parse_estimator(estimator: str | Estimator) -> ScoreEstimator:
    """The estimator that ``estimator`` names.

    Raises:
        ProblemError: an unknown name or option, or an estimator that gives no score a row.

    Example:
        >>> parse_estimator("unrolled").last_steps, parse_estimator("unrolled:steps=1").last_steps
        (None, 1)
    """
    name = estimator if isinstance(estimator, str) else repr(estimator)
    kind, _, options = name.partition(":")
    if kind == "gradient":
        return ScoreEstimator(with_options(IdentitySolver, options), name)
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
