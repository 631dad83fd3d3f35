"""A solver of Hv = b times a product: an implicit estimator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.estimator import Estimate, Estimator
from hyperopt_peft.hypergradients.oracle import Oracle, State
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.unrolled.optimizer_diagonal import (
    last_step,
    require_diagonal,
    step_metric,
)
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


@dataclass(frozen=True)
class Solver(Estimator):
    """dF/du = ∂F/∂u − ∂²f/∂u∂w · v, where ``solve`` finds v ≈ [∂²f/∂w²]⁻¹ ∂F/∂w.

    ``product`` chooses how second derivatives are taken: ``"exact"`` by double backward, or
    ``"difference"`` with first-order passes only and a step of length ``radius`` (None:
    chosen from the precision and ‖w‖). Where ∂F/∂w is zero the result is ∂F/∂u.

    ``metric`` chooses the variables of the solve. ``"optimizer"`` is the lower optimizer's own:
    with M = diag(√v̂ + eps) of Adam, AdamW or RMSprop after the last step (out of training, the
    one that would be taken next) and S = M^(−½), ``solve`` is given SHS and Sb and its answer is
    multiplied by S. The solution is the same, its preconditioning by M and its damping are not:
    (H + damping·M)v = b; residuals are of the scaled system. For SGD M is the identity.
    """

    product: ProductKind = field(default="exact", kw_only=True)
    radius: float | None = field(default=None, kw_only=True)
    metric: Literal["identity", "optimizer"] = field(default="identity", kw_only=True)

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(self.radius is None or self.radius > 0, "radius must be positive")

    @property
    def history(self) -> int:
        """The last lower step, for its optimizer's metric."""
        return 1 if self.metric == "optimizer" else 0

    @property
    def needs_optimizer_state(self) -> bool:
        """The optimizer's metric is in its state."""
        return self.metric == "optimizer"

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """As `Estimator.check_levels`; the optimizer's metric must be a known one."""
        super().check_levels(upper, lower)
        if self.metric == "optimizer":
            require_diagonal(lower)

    @abstractmethod
    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ H⁻¹ b, where ``matvec(v)`` is Hv and b is not zero."""

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        if b.norm() == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        root = self._root(oracle)
        with oracle.product(self.product, radius=self.radius) as product:
            matvec = self._finite(product.hessian)
            if root is None:
                found, state = self.advance(matvec, b, oracle.state)
            else:
                scaled = (lambda v: root * matvec(root * v)), root * b
                # M moves from one upper step to the next, so what is kept is in w's own variables.
                kept = _multiplied(Vector(part.reciprocal() for part in root), oracle.state)
                found, state = self.advance(*scaled, kept)
                found, state = replace(found, v=root * found.v), _multiplied(root, state)
            implicit = -product.mixed(found.v)
        return Estimate(direct, implicit, found.residual, found.steps, found.note, state)

    def advance(self, matvec: Matvec, b: Vector, state: State) -> tuple[Solution, State]:
        """What ``solve`` finds, and what to keep for the next upper step; ``state`` was kept."""
        return self.solve(matvec, b), {}

    def _root(self, oracle: Oracle) -> Vector | None:
        """The diagonal of S = M^(−½); None for the identity."""
        if self.metric == "identity":
            return None
        return Vector(part.rsqrt() for part in step_metric(oracle.lower, last_step(oracle)))

    def _finite(self, matvec: Matvec) -> Matvec:
        def checked(v: Vector) -> Vector:
            result = matvec(v)
            if not result.isfinite():
                raise NonFiniteError(
                    "a Hessian-vector product is not finite; lower the learning "
                    "rate, or bound the solver by fewer steps or by damping"
                )
            return result

        return checked


def _multiplied(factor: Vector, state: State) -> State:
    return {key: factor * x if isinstance(x, Vector) else x for key, x in state.items()}
