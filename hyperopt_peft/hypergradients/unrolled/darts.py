"""One unrolled gradient step, by finite differences: identity × difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind, Scheme
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.vector import Vector, zeros_like


class OneStep(Estimator):
    """The gradient through the last lower step: one mixed product, where that step began.

    The product is a difference of ∂f/∂u with a step of length ``epsilon``, central or
    forward; ``product="exact"`` replaces it by a double backward. A subclass has these options.
    """

    epsilon: float | None
    scheme: Scheme
    product: ProductKind

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(self.epsilon is None or self.epsilon > 0, "epsilon must be positive")

    @property
    def requirements(self) -> Requirements:
        """The last lower step, where the mixed product is taken.

        A forward difference needs ∂f/∂u at the unmoved point, too.
        """
        exact = self.product == "exact"
        return Requirements(
            history=1,
            lower_gradient=self.scheme == "forward" and not exact,
            second_derivatives=exact,
        )

    def mixed(self, oracle: Oracle, v: Vector) -> Vector:
        """∂²f/∂u∂w · v where the last lower step began; out of training at the current point."""
        at = oracle.history[-1] if oracle.history else None
        with oracle.product(
            self.product, at=at, epsilon=self.epsilon, scheme=self.scheme
        ) as product:
            return product.mixed(v)


@register("darts", kind="identity")
@dataclass(frozen=True)
class DARTS(OneStep):
    """dF/du ≈ ∂F/∂u − ξ·∂²f/∂u∂w · ∂F/∂w: the inverse Hessian is taken to be ξI.

    ``xi`` is ξ, a number or ``"lr"``, the lower optimizer's learning rate, with which
    this is the gradient through one step of gradient descent. The two are different
    algorithms: ξ multiplies the whole implicit term, and so does the scale of f.

    The mixed product is a finite difference of ∂f/∂u along ∂F/∂w with step length ``epsilon``.
    ``scheme="central"`` costs two forward+backward passes beyond ∂F and has an error of O(ε²);
    ``scheme="forward"`` costs one in training, where ∂f/∂u at the unmoved point is the lower
    step's own, and has an error of O(ε). In training the product is taken where the last lower step
    began, as in the formula. ``product="exact"`` replaces the difference by a double
    backward. Liu, Simonyan & Yang 2019, arXiv:1806.09055 Eq. 7–8.

    Example:
        F does not read u, so that one step of gradient descent at lr = 0.4 gives 0.4 of ξ = 1.

        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> one, = hypergradient(upper, lower, "darts")
        >>> step, = hypergradient(upper, lower, "darts:xi=lr")
        >>> step.allclose(0.4 * one)
        True
    """

    xi: float | Literal["lr"] = 1.0
    epsilon: float | None = None
    scheme: Scheme = "central"
    product: ProductKind = "difference"

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(self.xi == "lr" or self.xi >= 0, "xi must not be negative")
        super().check()

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

    def cost(self) -> Cost:
        """F, f, and the mixed product."""
        return one_step_cost(self, vectors=4)


def one_step_cost(estimator: OneStep, vectors: int) -> Cost:
    """F and f, and one mixed product: one or two gradients of f, or a graph and its derivative."""
    if estimator.product == "exact":
        return Cost(3, 4, vectors)
    passes = 3 if estimator.scheme == "forward" else 4
    return Cost(passes, passes, vectors)
