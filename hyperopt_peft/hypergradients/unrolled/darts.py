"""One unrolled gradient step, by finite differences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.dots import Dots, linear_layers
from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.products import ProductKind, Scheme
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.validation import NonNegativeFloat, PositiveFloat
from hyperopt_peft.utils.vector import Vector, zeros_like


@dataclass(frozen=True)
class OneStep(Estimator):
    """The gradient through the last lower step, by one mixed product at the start of the step.

    ``product="difference"`` is a central or forward difference of ∂f/∂u of length ``epsilon``,
    ``"exact"`` a double backward, and ``"dots"`` uses dot products, for a lower level that weights
    examples (`hypergradients.dots`).
    """

    epsilon: PositiveFloat | None = field(default=None, kw_only=True)
    scheme: Scheme = field(default="central", kw_only=True)
    product: ProductKind | Literal["dots"] = field(default="difference", kw_only=True)

    @property
    def requirements(self) -> Requirements:
        """The record of the last lower step; for a forward difference with ∂f/∂u."""
        return Requirements(
            history=1,
            lower_gradient=self.scheme == "forward" and self.product == "difference",
            second_derivatives=self.product == "exact",
            differences=self.product == "difference",
        )

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError for dots as `linear_layers`."""
        if self.product == "dots":
            linear_layers(lower)

    def mixed(self, oracle: Oracle, v: Vector) -> Vector:
        """∂²f/∂u∂w · v at the start of the last lower step (outside training, at the current w)."""
        if self.product == "dots":
            dots = oracle.dots or oracle.observe(Dots.of(oracle.lower, v), oracle.last)
            return dots.mixed(oracle.upper.variables)
        with oracle.product(
            self.product, at=oracle.last, epsilon=self.epsilon, scheme=self.scheme
        ) as product:
            return product.mixed(v)

    def cost(self) -> int:
        """The passes of F, f and the mixed product; in a Trainer, dots of `DARTS` take one less."""
        forward = self.product == "difference" and self.scheme == "forward"
        return 3 if forward or self.product == "dots" else 4


@register("darts", kind="identity")
@dataclass(frozen=True)
class DARTS(OneStep):
    """dF/du ≈ ∂F/∂u − ξ·∂²f/∂u∂w · ∂F/∂w, with the inverse Hessian replaced by ξI.

    ``xi`` is ξ: a number, or ``"lr"`` for the lower optimizer's learning rate. With ``"lr"`` the
    estimate is the gradient through one step of gradient descent. The implicit term is proportional
    to ξ and to the scale of f.

    By default the mixed product is a difference of ∂f/∂u along ∂F/∂w of length ``epsilon``. A
    central difference takes two passes and has an error of O(ε²); a forward one takes one, since
    the lower step has computed ∂f/∂u, and has an error of O(ε). ``product="exact"`` is a double
    backward, ``"dots"`` uses dot products. In training the product is taken at the start of the
    last lower step. Liu, Simonyan & Yang 2019, arXiv:1806.09055 Eq. 7–8.

    Raises:
        ProblemError: ``xi="lr"``, and the lower optimizer does not have exactly one learning rate.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("darts:xi=lr,scheme=forward").cost()
        3
    """

    xi: NonNegativeFloat | Literal["lr"] = 1.0

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        xi = self._learning_rate(oracle) if self.xi == "lr" else self.xi
        if xi == 0:
            return Estimate(direct, zeros_like(direct))
        return Estimate(direct, -xi * self.mixed(oracle, b))

    @property
    def requirements(self) -> Requirements:
        """As `OneStep`; dot products with ∂F/∂w come from the lower step's own pass."""
        return replace(super().requirements, observe=self.product == "dots")

    def observe(self, oracle: Oracle) -> Dots | None:
        """The dot products with ∂F/∂w, if ``product`` asks for them and ξ is not 0."""
        if self.product != "dots" or self.xi == 0:
            return None
        return Dots.of(oracle.lower, oracle.upper_gradient.b)

    def _learning_rate(self, oracle: Oracle) -> float:
        last = oracle.last and oracle.last.optimizer
        snapshot = last or oracle.lower.optimizer_snapshot(with_state=False)
        rates = {float(group["lr"]) for group in snapshot["groups"]}
        self.require(len(rates) > 0, 'xi="lr" needs an optimizer at the lower level')
        self.require(len(rates) == 1, f'xi="lr" needs one learning rate, there are {rates}')
        return rates.pop()
