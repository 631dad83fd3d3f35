"""One unrolled step of the lower optimizer, by finite differences."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hyperopt_peft.core.problem import Problem, StepRecord
from hyperopt_peft.hypergradients.estimator import Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.unrolled.darts import OneStep
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.hypergradients.unrolled.reverse import last_steps
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.vector import Vector


@register("sama", kind="unrolled")
@dataclass(frozen=True)
class SAMA(OneStep):
    """dF/du ≈ ∂F/∂u − ∂²f/∂u∂w · D ∂F/∂w, where D = −(∂w'/∂g)ᵀ for the lower step g ↦ w'.

    D is the derivative of a `DifferentiableStep`; it is diagonal without clipping. For Adam at step
    t, with gradient g, moments m and v, c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ and s = √(v/c2):

        D = lr·[(1−β1)/(c1(s+eps)) − (m/c1)(1−β2)g / (c2·s·(s+eps)²)]

    The estimate equals ``unrolled:steps=1``, by first-order passes. The step is the last lower
    step; outside training it is the next one, at the cost of one more forward+backward pass.
    Options as in `DARTS`. Choe et al. 2023, arXiv:2310.05674.

    With ``product="dots"`` in the Trainer, D is needed before ∂f/∂w is known. From the optimizer's
    second step on, D then uses the moments before the step and the clipped ∂F/∂w as g, and omits
    the derivative of clipping.

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
        """Raise ProblemError as `Estimator.check_levels` and `DifferentiableStep`."""
        super().check_levels(upper, lower)
        if lower.optimizer is not None:
            DifferentiableStep(lower, lower.optimizer_snapshot(with_state=False))

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        if oracle.dots is not None:
            norm = Vector.of(oracle.history[-1].gradient, oracle.lower.variables).norm()
            factor = oracle.lower.clipping(norm)
            return Estimate(direct, factor * oracle.dots.mixed(oracle.upper.variables))
        optimizer, (step,) = last_steps(oracle, 1)
        along = optimizer.vjp(step, b)[1]
        return Estimate(direct, self.mixed(oracle, along))

    def known_direction(self, oracle: Oracle) -> Vector | None:
        """−D ∂F/∂w with the moments before the step; None if there are none yet."""
        lower, above = oracle.lower, oracle.upper_gradient
        snapshot = lower.optimizer_snapshot(with_state=True)
        optimizer = DifferentiableStep(lower, snapshot, clipping=False)
        if optimizer.moment_names and not snapshot["state"]:
            return None
        gradient = (lower.clipping(above.norm) * above.b).parts
        step = StepRecord(None, RandomState({}), lower.variables, gradient, None, snapshot)
        return optimizer.vjp(step, above.b)[1]
