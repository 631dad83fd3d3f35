"""The penalty of f's distance from its minimum, which moves both levels."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt_peft.hypergradients.estimator import Cost, Estimate, Requirements
from hyperopt_peft.hypergradients.oracle import Oracle
from hyperopt_peft.hypergradients.penalty.inner_run import NOT_CONVEX, InnerRuns
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.vector import Vector, zeros_like


@register("penalty", kind="penalty", tolerance=0.1)
@dataclass(frozen=True)
class Penalty(InnerRuns):
    """dF/du ≈ ∂F/∂u(u, w) + γ(∂f/∂u(u, w) − ∂f/∂u(u, z)), z = argmin f, w = argmin f + F/γ.

    That is the u-gradient of F + γ(f − min_z f) at its minimum in w, with an error of O(1/γ). The
    estimator owns both updates: in training the lower steps descend f + F/γ, so that w is at that
    minimum when u moves, and the run solves the penalised problem, 1/γ away from the bilevel one.
    A lower step costs a pass of F more, on a batch of the upper level's data.

    What is left of ∂/∂w (f + F/γ) at w, on the step's batches, is taken off at z too, so that z
    solves ∂f/∂w(z) = ∂f/∂w(w) + (1/γ)·∂F/∂w(w): the difference holds what F has moved, not how
    far w still has to go, which γ would blow up. Out of training w stands where it is, too, and
    the error against the implicit formula at w is O(1/γ). z is kept as its distance from w and
    moved by up to ``inner_steps`` gradient steps an upper step.

    ``gamma`` is γ in units of F/f. ``free`` leaves the value function out, PBGD-Free: u moves
    along ∂F/∂u(u, w) alone, one pass. That takes F to be flat around the minimum of f in w: what
    it leaves out is the implicit term. It is wrong by all of that where F's minimum in w is
    elsewhere, and u does not move at all where F does not read it. Shen & Chen 2023,
    arXiv:2302.05185; Liu et al. 2022, arXiv:2209.08709; free: Jiang et al. 2025, arXiv:2507.20400.

    Example:
        First-order passes alone come within 1 % of the implicit formula.

        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> lower.solve()
        >>> found, = hypergradient(upper, lower, "penalty")
        >>> truth, = hypergradient(upper, lower, "exact")
        >>> ((found - truth).norm() < 0.01 * truth.norm()).item()
        True
    """

    gamma: float = 100.0
    free: bool = False

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        self.require(self.gamma > 0, "gamma must be positive")

    @property
    def requirements(self) -> Requirements:
        """The lower steps descend f + F/γ."""
        return Requirements(upper_weight=1 / self.gamma)

    def cost(self) -> Cost:
        """At most: F twice and f; f at w, along the first guess, and at each point of the run."""
        passes = 3 if self.free else 6 + self.inner_steps
        return Cost(passes, passes, 3 if self.free else 14)

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        if self.free:
            return Estimate(direct, zeros_like(direct))
        if oracle.upper_gradient.norm == 0:
            return Estimate(direct, zeros_like(direct), 0.0, 0, "∂F/∂w is zero", oracle.state)
        with oracle.moved() as gradients:
            of_u, slope = gradients("lower", zeros_like(b))
            start = self.response(oracle, gradients, slope)
            if start is None:
                return Estimate(direct, zeros_like(direct), 1.0, 0, NOT_CONVEX)

            def gradient(offset: Vector) -> tuple[Vector, Vector]:
                f = gradients("lower", offset)
                return f[0], f[1].add_(slope, -1).add_(b, -self.requirements.upper_weight)

            at_w = of_u, b * -self.requirements.upper_weight
            z = self.minimum(gradient, at_w, start * -self.requirements.upper_weight)
        return Estimate(
            direct,
            self.gamma * (of_u - z.of_u),
            z.residual,
            z.steps,
            z.note,
            {"response": -self.gamma * z.offset},
        )
