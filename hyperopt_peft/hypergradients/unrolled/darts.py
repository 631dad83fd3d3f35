"""One unrolled gradient step, by finite differences: identity × difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hyperopt_peft.hypergradients.estimator import Estimate, Estimator
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.vector import Vector, zeros_like


class OneStep(Estimator):
    """The gradient through the last lower step: one mixed product, where that step began.

    The product is a difference of ∂f/∂u with a step of length ``radius``, of one or two
    ``sides``; ``product="exact"`` replaces it by a double backward. A subclass has these options.
    """

    radius: float | None
    sides: int
    product: ProductKind

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(self.radius is None or self.radius > 0, "radius must be positive")
        self.require(self.sides in (1, 2), f"sides must be 1 or 2, got {self.sides}")

    @property
    def history(self) -> int:
        """The last lower step: its start is where the mixed product is taken."""
        return 1

    @property
    def reuses_lower_gradient(self) -> bool:
        """A one-sided difference needs ∂f/∂u at the unmoved point."""
        return self.sides == 1 and self.product == "difference"

    def mixed(self, oracle: Oracle, v: Vector) -> Vector:
        """∂²f/∂u∂w · v where the last lower step began; out of training at the current point."""
        at = oracle.history[-1] if oracle.history else None
        with oracle.product(self.product, at=at, radius=self.radius, sides=self.sides) as product:
            return product.mixed(v)


@register("darts", kind="identity")
@dataclass(frozen=True)
class DARTS(OneStep):
    """dF/du ≈ ∂F/∂u − ξ·∂²f/∂u∂w · ∂F/∂w: the inverse Hessian is taken to be ξI.

    ``scale`` is ξ, a number or ``"lr"``, the lower optimizer's learning rate, with which
    this is the gradient through one step of gradient descent. The two are different
    algorithms: ξ multiplies the whole implicit term, and so does the scale of f.

    The mixed product is a finite difference of ∂f/∂u along ∂F/∂w with step length
    ``radius``. ``sides=2`` costs two forward+backward passes beyond ∂F; ``sides=1`` costs
    one in training, where ∂f/∂u at the unmoved point is the lower step's own, and its error
    is O(ε) rather than O(ε²). In training the product is taken where the last lower step
    began, as in the formula. ``product="exact"`` replaces the difference by a double
    backward. Liu, Simonyan & Yang 2019, arXiv:1806.09055 Eq. 7–8.
    """

    scale: float | Literal["lr"] = 1.0
    radius: float | None = None
    sides: int = 2
    product: ProductKind = "difference"

    def check(self) -> None:
        """Check the ranges of the options."""
        self.require(self.scale == "lr" or self.scale >= 0, "scale must not be negative")
        super().check()

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        scale = self._learning_rate(oracle) if self.scale == "lr" else self.scale
        if scale == 0:
            return Estimate(direct, zeros_like(direct))
        return Estimate(direct, -scale * self.mixed(oracle, b))

    def _learning_rate(self, oracle: Oracle) -> float:
        last = oracle.history[-1].optimizer if oracle.history else None
        snapshot = last or oracle.lower.optimizer_snapshot(with_state=False)
        rates = {float(group["lr"]) for group in snapshot["groups"]}
        self.require(len(rates) > 0, 'scale="lr" needs an optimizer at the lower level')
        self.require(len(rates) == 1, f'scale="lr" needs one learning rate, there are {rates}')
        return rates.pop()
