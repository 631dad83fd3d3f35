"""A solver of Hv = b times a product: an implicit estimator."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Oracle, State
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, zeros_like

Matvec = Callable[[Vector], Vector]


@dataclass(frozen=True)
class Solution:
    """v ≈ H⁻¹b, and how it was reached.

    ``residual`` is ‖b − Hv‖/‖b‖ (None where the solver does not know it), ``steps`` the
    iterations done, ``note`` anything the user should know, such as negative curvature.
    """

    v: Vector
    residual: float | None = None
    steps: int | None = None
    note: str = ""


Advance = Callable[[Matvec, Vector, State], tuple[Solution, State]]


@dataclass(frozen=True)
class Solver(Estimator):
    """dF/du = ∂F/∂u − ∂²f/∂u∂w · v, where ``solve`` finds v ≈ [∂²f/∂w²]⁻¹ ∂F/∂w.

    ``product`` chooses how second derivatives are taken: ``"exact"`` by double backward, or
    ``"difference"`` with first-order passes only and a step of length ``epsilon`` (None:
    chosen from the precision and ‖w‖). Where ∂F/∂w is zero the result is ∂F/∂u.
    """

    product: ProductKind = field(default="exact", kw_only=True)
    epsilon: float | None = field(default=None, kw_only=True)

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(self.epsilon is None or self.epsilon > 0, "epsilon must be positive")

    @property
    def requirements(self) -> Requirements:
        """Second derivatives for exact products."""
        return Requirements(second_derivatives=self.product == "exact")

    def products_cost(self, products: int, vectors: int) -> Cost:
        """The cost of F, f, ``products`` Hessian-vector products and one mixed product.

        An exact product is one backward pass on a kept graph, a difference two gradients of f.
        """
        if self.product == "exact":
            return Cost(3, 4 + products, vectors)
        return Cost(4 + 2 * products, 4 + 2 * products, vectors + 2)

    @abstractmethod
    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ H⁻¹ b, where ``matvec(v)`` is Hv and b is not zero."""

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        above = oracle.upper_gradient
        direct, b = above.direct, above.b
        if above.norm == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        advance = self.prepare(oracle)
        with oracle.product(self.product, epsilon=self.epsilon) as product:
            found, state = advance(product.hessian, b, oracle.state)
            self.require(
                isinstance(found, Solution) and isinstance(found.v, Vector),
                f"solve must return a Solution of a Vector, Solution(v), got {_shown(found)}",
            )
            implicit = product.mixed(found.v).mul_(-1.0)
        return Estimate(direct, implicit, found.residual, found.steps, found.note, state)

    def prepare(self, oracle: Oracle) -> Advance:
        """``advance``, or another that knows more of the oracle's point than products tell."""
        return self.advance

    def advance(self, matvec: Matvec, b: Vector, state: State) -> tuple[Solution, State]:
        """What ``solve`` finds, and what to keep for the next upper step; ``state`` was kept."""
        return self.solve(matvec, b), {}


def read_finite(*scalars: Tensor) -> list[float]:
    """The values of scalar tensors that products with H lead to, by one transfer.

    Raises:
        NonFiniteError: see `require_finite`.
    """
    return require_finite(*to_floats(scalars))


def require_finite(*values: float) -> list[float]:
    """``values``, which products with H have led to.

    A NaN or an infinity in Hv shows in ⟨v, Hv⟩ and in ‖Hv‖, so a solver that reads one of these
    needs no other test.

    Raises:
        NonFiniteError: one of them is NaN or infinite.
    """
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(
            "a Hessian-vector product is not finite; lower the learning "
            "rate, or bound the solver by fewer steps or by damping"
        )
    return list(values)


def _shown(answer: object) -> str:
    kind = type(answer).__name__
    return f"Solution({type(answer.v).__name__})" if isinstance(answer, Solution) else kind
