"""The gradient through steps of the lower optimizer, in forward mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled, last_steps
from hyperopt_peft.utils.validation import PositiveInt
from hyperopt_peft.utils.vector import dot, zeros_like


@register("forward", kind="unrolled")
@dataclass(frozen=True)
class Forward(Unrolled):
    """dF/du_j = ∂F/∂u_j + ⟨Z_j, ∂F/∂w⟩ with Z_j = dw/du_j, for a few upper unknowns.

    The estimate is `Unrolled` in forward mode. With Φ(w, g) the optimizer's step, e_j the j-th unit
    vector and Φ_w, Φ_g the partial derivatives,

        Z_j' = Φ_w Z_j + Φ_g (∂²f/∂w² Z_j + ∂²f/∂w∂u e_j)

    The optimizer's moments have tangents too. A step costs one forward+backward pass, one product
    for each unknown, and one backward pass more for exact products. The memory is one vector shaped
    like w for each unknown and moment. Franceschi et al. 2017, arXiv:1703.01785, Alg. 2.

    Raises:
        ProblemError: there are more upper unknowns than ``limit``; or as `Unrolled`.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("forward:steps=10").limit
        32
    """

    limit: PositiveInt = 32

    def cost(self) -> None:
        """None, since the cost depends on the number of upper unknowns."""
        return None

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """As `Unrolled`; there must be at most ``limit`` upper unknowns."""
        super().check_levels(upper, lower)
        n = sum(variable.numel() for variable in upper.variables)
        self.require(
            n <= self.limit,
            f"{n} upper unknowns are more than limit={self.limit}, and each costs a product a "
            'step; use reverse mode, "unrolled", or raise limit',
        )

    def estimate(self, oracle: Oracle) -> Estimate:
        """dF/du at the oracle's point."""
        direct, b = oracle.upper_gradient.direct, oracle.upper_gradient.b
        n = direct.numel()
        optimizer, steps = last_steps(oracle, self.steps)
        units = [direct.with_entries(row) for row in torch.eye(n)]
        zeros = [part for part in zeros_like(b) for _ in optimizer.moment_names]
        tangents = [(zeros_like(b), zeros) for _ in range(n)]
        for step in steps:
            with oracle.product(self.product, at=step, epsilon=self.epsilon) as product:
                for j, (z, moments) in enumerate(tangents):
                    g = product.both(z, units[j])[0]
                    tangents[j] = optimizer.jvp(step, z, g, moments)
        implicit = torch.tensor([dot(z, b) for z, _ in tangents], dtype=torch.float64)
        return Estimate(direct, direct.with_entries(implicit), steps=len(steps))
