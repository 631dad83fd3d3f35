"""The interface of an implicit estimator: a solver of Hv = b, and second-derivative products."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.kernel import Matvec as Matvec
from hyperopt_peft.hypergradients.kernel import implicit_term
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle, State
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.validation import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon, normalised, zeros_like


@dataclass(frozen=True)
class Solution:
    """v ≈ H⁻¹b, and a report of the solve.

    ``residual`` is ‖b − Hv‖/‖b‖, None if unknown; ``steps`` is the number of iterations; ``note``
    is a message for the user, for example about negative curvature.

    Example:
        >>> from torch import ones
        >>> Solution(Vector([ones(2)]), residual=0.01).residual
        0.01
    """

    v: Vector
    residual: float | None = None
    steps: int | None = None
    note: str = ""


Advance = Callable[[Matvec, Vector, State], tuple[Solution, State]]


@dataclass(frozen=True)
class Solver(Estimator):
    """dF/du = ∂F/∂u − ∂²f/∂u∂w · v, where a subclass's ``solve`` gives v ≈ [∂²f/∂w²]⁻¹ ∂F/∂w.

    ``product`` is the kind of second derivatives: ``"exact"`` uses double backward,
    ``"difference"`` first-order passes at distance ``epsilon`` from w (`default_epsilon` if None).
    If ∂F/∂w is zero, the result is ∂F/∂u. The pair of passes for a mixed difference also gives Hv,
    and with it the residual of v itself: the steps cannot see the truncation of their differences.

    Raises:
        NonFiniteError: a Hessian-vector product is NaN or infinite.

    Example:
        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> class Half(Solver):
        ...     def solve(self, matvec, b):
        ...         return Solution(0.5 * b)
        >>> upper, lower = diabetes()
        >>> half, = hypergradient(upper, lower, Half())
        >>> half.allclose(hypergradient(upper, lower, "darts:xi=0.5")[0])
        True
    """

    product: ProductKind = field(default="exact", kw_only=True)
    epsilon: PositiveFloat | None = field(default=None, kw_only=True)

    @property
    def requirements(self) -> Requirements:
        """Second derivatives for exact products, otherwise differences."""
        exact = self.product == "exact"
        return Requirements(second_derivatives=exact, differences=not exact)

    def products_cost(self, products: int) -> int:
        """The passes of F, f, ``products`` Hessian-vector products and one mixed product.

        An exact product differentiates twice, on one graph of f; a difference has two gradients.
        """
        return (5 if self.product == "exact" else 4) + 2 * products

    def rounding(self, b: Vector) -> float:
        """The relative error of a product: δ, or δ^(2/3) for a difference (`default_epsilon`)."""
        epsilon = machine_epsilon(b)
        return epsilon if self.product == "exact" else float(epsilon ** (2 / 3))

    @abstractmethod
    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ H⁻¹ b, where ``matvec(v)`` is Hv, and b ≠ 0."""

    def estimate(self, oracle: Oracle, advance: Advance | None = None) -> Estimate:
        """dF/du at the oracle's point; ``advance`` replaces the method `advance`."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        if oracle.upper_gradient.norm == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        solution, state, of_v = Solution(b), oracle.state, None

        def solve(matvec: Matvec, b: Vector) -> Vector:
            nonlocal solution, state
            solution, state = (advance or self.advance)(matvec, b, oracle.state)
            return solution.v

        def mixed(v: Vector) -> Vector:
            nonlocal of_v
            if solution.residual is None or self.product == "exact":
                return product.mixed(v)
            of_v, implicit = product.both(v)
            return implicit

        with oracle.product(self.product, epsilon=self.epsilon) as product:
            implicit = implicit_term(product.hessian, mixed, b, solve)
        residual = solution.residual
        if of_v is not None:
            left = of_v.plus(solution.v, getattr(self, "damping", None) or 0.0).add_(b, -1.0)
            residual = left.norm() / oracle.upper_gradient.norm
        return Estimate(direct, implicit, residual, solution.steps, solution.note, state)

    def advance(self, matvec: Matvec, b: Vector, state: State) -> tuple[Solution, State]:
        """The solution, and the next ``state``; a subclass may use ``state`` as a warm start."""
        return self.solve(matvec, b), {}


@dataclass(frozen=True)
class Krylov(Solver):
    """A solver with ``steps`` products at most, which ends at relative residual ``tolerance``."""

    steps: PositiveInt = 10
    damping: NonNegativeFloat = 0.0
    tolerance: Fraction = 1e-6

    def cost(self) -> int:
        """The cost of ``steps`` products, the most that the solver takes."""
        return self.products_cost(self.steps)


def power_iteration(matvec: Matvec, start: Vector, steps: int) -> tuple[Vector, float]:
    """Hv for the last unit vector v of ``steps`` power steps, and ‖Hv‖ ≤ |λ|max."""
    v = start
    for _ in range(steps):
        v = matvec(normalised(v))
    return v, math.sqrt(*read_finite(inner(v, v)))


def read_finite(*scalars: Tensor) -> list[float]:
    """The values of ``scalars``, by one read from the device, after `require_finite`."""
    return require_finite(*to_floats(scalars))


def require_finite(*values: float) -> list[float]:
    """``values``, which were computed from Hessian-vector products.

    A NaN or infinite entry of Hv makes ⟨v, Hv⟩ and ‖Hv‖ NaN or infinite, so that checking one of
    these numbers is enough: a NonFiniteError.
    """
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(
            "a Hessian-vector product is not finite; lower the learning "
            "rate, or bound the solver by fewer steps or by damping"
        )
    return list(values)
