"""The central difference of a penalised value function."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt_peft.hypergradients.estimator import Cost, Estimate
from hyperopt_peft.hypergradients.oracle import MovedGradients, Oracle
from hyperopt_peft.hypergradients.penalty.inner_run import NOT_CONVEX, InnerRuns, Minimum
from hyperopt_peft.hypergradients.products import default_epsilon
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon, zeros_like


@register("f2sa", kind="penalty", tolerance=0.1)
@dataclass(frozen=True)
class F2SA(InnerRuns):
    """dF/du ≈ [∂/∂u (f + νF)(u, w_ν) − ∂/∂u (f − νF)(u, w_−ν)] / 2ν, w_±ν = argmin_w f ± νF.

    For φ(ν, u) = min_w f + νF, ∂φ/∂ν = F(w_ν) and ∂φ/∂u = ∂/∂u (f + νF)(w_ν). So
    dF/du = ∂²φ/∂ν∂u at ν = 0, of which the estimate is a central difference with an error of O(ν²).

    In these formulas f is f − ⟨∂f/∂w(w), ·⟩, whose minimum is the current w. So the estimate tends
    to the implicit formula at w, as that of a solver, though w is not the minimum of f on a batch.
    If ∂f/∂w = 0, the estimate is that of the papers.

    ν is such that w moves by `default_epsilon`, or less, so that the relative change of ∂F/∂w is at
    most δ^(1/3), δ the machine epsilon. So the estimate is equivariant to factors of f and F. Each
    point of an `InnerRuns` costs a pass of f and one of F. Kwon et al. 2023, arXiv:2301.10945
    (one-sided); Chen et al. 2025, arXiv:2509.02937 (F2SA-2).

    Example:
        The relative error to the implicit formula is below 1 %.

        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> h, = hypergradient(upper, lower, "f2sa")
        >>> truth, = hypergradient(upper, lower, "exact")
        >>> ((h - truth).norm() < 0.01 * truth.norm()).item()
        True
    """

    def cost(self) -> Cost:
        """The cost at ``inner_steps`` steps of each run."""
        passes = 5 + 4 * (self.inner_steps + 1)
        return Cost(passes, passes, 15)

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        if oracle.upper_gradient.norm == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        with oracle.moved() as gradients:
            at_w = gradients("lower", zeros_like(b))
            start = self.response(oracle, gradients, at_w[1])
            if start is None:
                return Estimate(direct, zeros_like(direct), 1.0, 0, NOT_CONVEX)
            nu = self._nu(oracle, gradients, start)
            above = self._side(nu, oracle, gradients, at_w, nu * start)
            below = self._side(-nu, oracle, gradients, at_w, -above.offset)
        total = (above.of_u - below.of_u) / (2 * nu)
        return Estimate(
            direct,
            total - direct,
            max(above.residual, below.residual),
            above.steps + below.steps,
            above.note or below.note,
            {"response": (above.offset - below.offset) / (2 * nu)},
        )

    def _nu(self, oracle: Oracle, gradients: MovedGradients, response: Vector) -> float:
        """ν, where dw_ν/dν ≈ ``response`` at ν = 0."""
        b = oracle.upper_gradient.b
        u, w = oracle.upper.variables, oracle.lower.variables
        epsilon, square = to_floats([default_epsilon(w, beside=u), inner(response, response)])
        nu = epsilon / math.sqrt(square)
        change = gradients("upper", nu * response)[1] - b
        changed, of_b = to_floats([inner(change, change), inner(b, b)])
        share = math.sqrt(changed / of_b)
        return float(nu * min(1.0, machine_epsilon(b) ** (1 / 3) / max(share, 1e-30)))

    def _side(
        self,
        nu: float,
        oracle: Oracle,
        gradients: MovedGradients,
        at_w: tuple[Vector, Vector],
        start: Vector,
    ) -> Minimum:
        """The minimum of f − ⟨∂f/∂w(w), ·⟩ + ``nu``·F near w."""
        of_u, slope = at_w
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b

        def gradient(offset: Vector) -> tuple[Vector, Vector]:
            f, upper_f = gradients("lower", offset), gradients("upper", offset)
            return f[0].add_(upper_f[0], nu), f[1].add_(slope, -1).add_(upper_f[1], nu)

        return self.minimum(gradient, (of_u + nu * direct, nu * b), start)
