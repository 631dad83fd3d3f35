"""A first-order estimator from a second point, which descends f and a share of F."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from hyperopt_peft.hypergradients.estimator import Estimator, Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, MovedGradients, Oracle
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.validation import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from hyperopt_peft.utils.vector import Vector, inner, normalised, zeros_like

STEP = 0.5  # times 1/curvature, since the curvature along y − w may be half of the largest
FIRST_STEPS = 40  # inner steps before those of the first upper step
FORGET = 0.97  # decay of the curvature per upper step, since it is far larger on a few batches


@register("f2sa", kind="penalty", tolerance=0.2)
@dataclass(frozen=True)
class F2SA(Estimator):
    """dF/du ≈ ∂F/∂u(u, y) + λ[∂f/∂u(u, y) − ∂f/∂u(u, w)], where y descends f + F/λ.

    At minima w of f and y of f + F/λ, the estimate is the gradient of min_y F + λ(f(y) − f(w)). Its
    error is O(1/λ), and λ is in units of F/f. The method is a single loop: the lower steps move w.
    y moves with w, and by ``inner_steps`` steps along −(∂f/∂w(y) − ∂f/∂w(w) + ∂F/∂w(y)/λ) for each
    upper step, so that a remaining gradient of f at w cancels. λ is ``multiplier`` at the first
    upper step, and grows by ``growth`` with each one.

    The step size is ½/h, where h is the largest curvature along y − w and along the inner steps; it
    slowly forgets. The inner steps end at a relative residual of ``tolerance``, or where the
    curvature is not positive. The first upper step, and a call outside training, begins with 40
    more. Kwon et al. 2023, arXiv:2301.10945, Alg. 1; with a constant λ: Pan et al. 2024,
    arXiv:2406.19976.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("f2sa:multiplier=10,growth=0.1").cost()
        5
    """

    inner_steps: PositiveInt = 1
    multiplier: PositiveFloat = 100.0
    growth: NonNegativeFloat = 1.0
    tolerance: Fraction = 3e-3

    @property
    def requirements(self) -> Requirements:
        """Gradients at close points."""
        return Requirements(differences=True)

    def cost(self) -> int:
        """The cost after the first upper step: F and f at w, both at each y, and the lower step."""
        return 3 + 2 * self.inner_steps

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct = oracle.upper_gradient.direct
        if oracle.upper_gradient.norm == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        with oracle.moved() as gradients:
            return self._descend(oracle, gradients)

    def _descend(self, oracle: Oracle, gradients: MovedGradients) -> Estimate:
        """Inner steps of the response λ(y − w), from that of the last upper step."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        state, steps = oracle.state, self.inner_steps
        multiplier = cast(float, state.get("multiplier", self.multiplier))
        curvature = FORGET * cast(float, state.get("curvature", 0.0))
        if "response" in state:
            response = cast(Vector, state["response"])
        else:
            length = default_epsilon(oracle.lower.variables, beside=oracle.upper.variables)
            response, steps = normalised(b) * (-multiplier * length), steps + FIRST_STEPS
        f_of_u, f_of_w = gradients("lower", zeros_like(b))
        before, slope = zeros_like(b), b  # the last point's response and gradient
        implicit, residual, taken, note = zeros_like(direct), 1.0, 0, ""
        while taken < steps and (not taken or residual > self.tolerance):
            offset = response / multiplier
            (at_u, at_w), (of_u, of_w) = gradients("lower", offset), gradients("upper", offset)
            gradient = of_w.add_(at_w.add_(f_of_w, -1.0), multiplier)
            moved, change = response - before, gradient - slope
            pairs = (gradient, gradient), (moved, change), (moved, moved), (change, change)
            square, along, of_moved, of_change = to_floats([inner(x, y) for x, y in pairs])
            if along <= 0:
                response, note = before, "the curvature of f is not positive"
                break
            taken += 1
            implicit = of_u.add_(at_u.add_(f_of_u, -1.0), multiplier).add_(direct, -1.0)
            residual = math.sqrt(square) / oracle.upper_gradient.norm
            curvature = max(curvature, math.sqrt(of_change / of_moved))
            before, slope = response, gradient
            response = response.plus(gradient, -STEP / curvature)
        new: dict[str, Vector | float] = {"multiplier": multiplier + self.growth}
        if taken:
            new.update(response=response, curvature=curvature)
        return Estimate(direct, implicit, residual, taken, note, new)
