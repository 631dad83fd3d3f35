"""One unrolled step of the lower optimizer, by finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.estimator import Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.unrolled.darts import OneStep
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.hypergradients.unrolled.reverse import last_steps


@register("sama", kind="unrolled")
@dataclass(frozen=True)
class SAMA(OneStep):
    """dF/du ≈ ∂F/∂u − ∂²f/∂u∂w · D ∂F/∂w, where D = −(∂w'/∂g)ᵀ for the lower step g ↦ w'.

    D is the derivative of a `DifferentiableStep`; it is diagonal without clipping. For Adam at step
    t, with gradient g, moments m and v, c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ and s = √(v/c2):

        D = lr·[(1−β1)/(c1(s+eps)) − (m/c1)(1−β2)g / (c2·s·(s+eps)²)]

    The estimate equals ``unrolled:steps=1``, by first-order passes. The step is the last lower
    step; outside training it is the next one, at the cost of one more forward+backward pass.
    Options as in `DARTS`; dot products take a pass of their own, since D is not known before the
    step. Choe et al. 2023, arXiv:2310.05674.

    Raises:
        ProblemError: the lower optimizer cannot be differentiated (`DifferentiableStep`).

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("sama:scheme=forward")
        SAMA(epsilon=None, scheme='forward', product='difference')
    """

    @property
    def requirements(self) -> Requirements:
        """As `OneStep`, with the optimizer's state."""
        return replace(super().requirements, optimizer_state=True)

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError as `OneStep` and `DifferentiableStep`."""
        super().check_levels(upper, lower)
        if lower.optimizer is not None:
            DifferentiableStep(lower, lower.optimizer_snapshot(with_state=False))

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        optimizer, (step,) = last_steps(oracle, 1)
        return Estimate(direct, self.mixed(oracle, optimizer.vjp(step, b)[1]))
