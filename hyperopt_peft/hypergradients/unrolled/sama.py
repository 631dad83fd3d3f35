"""One unrolled step of the lower optimizer, by finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Requirements
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.products import ProductKind, Scheme
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.unrolled.darts import OneStep, one_step_cost
from hyperopt_peft.hypergradients.unrolled.optimizer_step import OptimizerStep
from hyperopt_peft.hypergradients.unrolled.reverse import last_steps


@register("sama", kind="unrolled")
@dataclass(frozen=True)
class SAMA(OneStep):
    """dF/du ≈ ∂F/∂u − ∂²f/∂u∂w · D ∂F/∂w, where D = −(∂w'/∂g)ᵀ is of the lower step g ↦ w'.

    D is the derivative of the optimizer's own step, an `OptimizerStep`. Without clipping D is
    diagonal. For Adam, with g, m and v as in the step, c = 1 − βᵗ and s = √(v/c2):

        D = lr·[(1−β1)/(c1(s+eps)) − (m/c1)(1−β2)g / (c2·s·(s+eps)²)]

    This is ``unrolled:steps=1`` by first-order passes. In training the step is the recorded one,
    and the product is taken where it began; out of training it is the one that would be taken
    next, for one forward+backward more. ``epsilon``, ``scheme`` and ``product`` are those of
    ``darts``, and so are the passes through a model. Choe et al. 2023, arXiv:2310.05674.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("sama:scheme=forward")
        SAMA(epsilon=None, scheme='forward', product='difference')
    """

    epsilon: float | None = None
    scheme: Scheme = "central"
    product: ProductKind = "difference"

    @property
    def requirements(self) -> Requirements:
        """As `OneStep`, with the optimizer's state, of which a step's derivative is a function."""
        return replace(super().requirements, optimizer_state=True)

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """As `Estimator.check_levels`; the optimizer must have an `OptimizerStep`."""
        super().check_levels(upper, lower)
        if lower.optimizer is not None:
            OptimizerStep(lower, lower.optimizer_snapshot(with_state=False))

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        optimizer, (step,) = last_steps(oracle, 1)
        along = optimizer.vjp(step, b)[1]
        return Estimate(direct, self.mixed(oracle, along))

    def cost(self) -> Cost:
        """As `OneStep`, and a pass through the optimizer's own step, which is elementwise."""
        cost = one_step_cost(self, vectors=11)
        return replace(cost, backward_passes=cost.backward_passes + 1)
