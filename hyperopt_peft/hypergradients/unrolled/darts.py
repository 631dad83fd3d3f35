"""One unrolled gradient step, by finite differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind, Scheme
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.validation import NonNegativeFloat, PositiveFloat
from hyperopt_peft.utils.vector import Vector, zeros_like


@dataclass(frozen=True)
class OneStep(Estimator):
    """The gradient through the last lower step, by one mixed product at the step's start.

    The product is a difference of ∂f/∂u of length ``epsilon``, central or forward, or a double
    backward with ``product="exact"``.
    """

    epsilon: PositiveFloat | None = field(default=None, kw_only=True)
    scheme: Scheme = field(default="central", kw_only=True)
    product: ProductKind = field(default="difference", kw_only=True)

    @property
    def requirements(self) -> Requirements:
        """The last lower step; for a forward difference also ∂f/∂u at its start."""
        exact = self.product == "exact"
        return Requirements(
            history=1,
            lower_gradient=self.scheme == "forward" and not exact,
            second_derivatives=exact,
        )

    def mixed(self, oracle: Oracle, v: Vector) -> Vector:
        """∂²f/∂u∂w · v at the start of the last lower step; outside training at the current w."""
        at = oracle.history[-1] if oracle.history else None
        with oracle.product(
            self.product, at=at, epsilon=self.epsilon, scheme=self.scheme
        ) as product:
            return product.mixed(v)

    def cost(self) -> Cost:
        """F, f, and the mixed product."""
        if self.product == "exact":
            return Cost(3, 4, 4)
        passes = 3 if self.scheme == "forward" else 4
        return Cost(passes, passes, 4)


@register("darts", kind="identity")
@dataclass(frozen=True)
class DARTS(OneStep):
    """dF/du ≈ ∂F/∂u − ξ·∂²f/∂u∂w · ∂F/∂w, with the inverse Hessian replaced by ξI.

    ``xi`` is ξ: a number, or ``"lr"`` for the lower optimizer's learning rate. With ``"lr"`` the
    estimate is the gradient through one step of gradient descent. The implicit term is proportional
    to ξ and to the scale of f.

    The mixed product is a finite difference of ∂f/∂u along ∂F/∂w of length ``epsilon``, in training
    at the start of the last lower step. ``scheme="central"`` costs two forward+backward passes and
    has an error of O(ε²). ``scheme="forward"`` has an error of O(ε) and costs one pass in training,
    where ∂f/∂u is known from the lower step. ``product="exact"`` is a double backward instead.
    Liu, Simonyan & Yang 2019, arXiv:1806.09055 Eq. 7–8.

    Example:
        The learning rate of the lower level is 0.4, and ∂F/∂u is zero.

        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> one, = hypergradient(upper, lower, "darts")
        >>> step, = hypergradient(upper, lower, "darts:xi=lr")
        >>> step.allclose(0.4 * one)
        True
    """

    xi: NonNegativeFloat | Literal["lr"] = 1.0

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        xi = self._learning_rate(oracle) if self.xi == "lr" else self.xi
        if xi == 0:
            return Estimate(direct, zeros_like(direct))
        return Estimate(direct, -xi * self.mixed(oracle, b))

    def _learning_rate(self, oracle: Oracle) -> float:
        last = oracle.history[-1].optimizer if oracle.history else None
        snapshot = last or oracle.lower.optimizer_snapshot(with_state=False)
        rates = {float(group["lr"]) for group in snapshot["groups"]}
        self.require(len(rates) > 0, 'xi="lr" needs an optimizer at the lower level')
        self.require(len(rates) == 1, f'xi="lr" needs one learning rate, there are {rates}')
        return rates.pop()
