"""The gradient through steps of the lower optimizer, in forward mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.hypergradients.estimator import ALL, Requirements
from hyperopt_peft.hypergradients.oracle import Estimate, Oracle, State
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled, last_steps
from hyperopt_peft.utils.validation import PositiveInt
from hyperopt_peft.utils.vector import Vector, dot, zeros_like


@register("forward", kind="unrolled")
@dataclass(frozen=True)
class Forward(Unrolled):
    """dF/du_j = ∂F/∂u_j + ⟨Z_j, ∂F/∂w⟩ with Z_j = dw/du_j, for a few upper unknowns.

    The estimate is `Unrolled` in forward mode. With Φ(w, g, options) the optimizer's step, e_j the
    j-th unit vector and Φ_w, Φ_g, Φ_u the partial derivatives,

        Z_j' = Φ_w Z_j + Φ_g (∂²f/∂w² Z_j + ∂²f/∂w∂u e_j) + Φ_u e_j

    The optimizer's moments have tangents too. A step costs one forward+backward pass, one product
    for each unknown, and one backward pass more for exact products. The memory is one vector shaped
    like w for each unknown and moment.

    With ``carry`` every lower step is differentiated, and the tangents continue over upper steps
    (real-time recurrent learning): the hypergradient goes through all lower steps since the
    warm-up, at constant memory. Each step is differentiated at its own value of u. The lower steps
    of a skipped upper step are omitted. Without ``carry`` the tangents are reset after each upper
    step. Franceschi et al. 2017, arXiv:1703.01785, Alg. 2 and §3.3.

    Raises:
        ProblemError: there are more upper unknowns than ``limit``; or as `Unrolled`.

    Example:
        >>> from hyperopt_peft.hypergradients import get_estimator
        >>> get_estimator("forward:carry=true").limit
        32
    """

    carry: bool = False
    limit: PositiveInt = 32

    @property
    def requirements(self) -> Requirements:
        """As `Unrolled`; with ``carry`` the records of every lower step."""
        needs = super().requirements
        return replace(needs, history=ALL) if self.carry else needs

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
        # Row k is the derivative of the optimizer's k-th option with respect to each unknown.
        slopes = [
            optimizer.pulled_back(list(row), oracle.upper.variables).flat()
            for row in torch.eye(len(optimizer.options))
        ]
        units = [direct.with_entries(row) for row in torch.eye(n)]
        state = oracle.state if self.carry else {}
        tangents = [_tangents(state, j, b, optimizer) for j in range(n)]
        for step in steps:
            with oracle.product(self.product, at=step, epsilon=self.epsilon) as product:
                for j, (z, moments) in enumerate(tangents):
                    g = product.both(z, units[j])[0]
                    options = [slope[j] for slope in slopes]
                    tangents[j] = optimizer.jvp(step, z, g, moments, options)
        implicit = torch.tensor([dot(z, b) for z, _ in tangents], dtype=torch.float64)
        new: dict[str, Vector | float] = {}
        if self.carry:
            for j, (z, moments) in enumerate(tangents):
                named = {"w": z, **optimizer.moments(moments)}
                new |= {f"{name}/{j}": vector for name, vector in named.items()}
        return Estimate(direct, direct.with_entries(implicit), steps=len(steps), state=new)


def _tangents(
    state: State, unknown: int, like: Vector, optimizer: DifferentiableStep
) -> tuple[Vector, list[Tensor]]:
    """The tangents of w and the moments for one ``unknown``; zero if ``state`` has none."""

    def tangent(name: str) -> Vector:
        vector = state.get(f"{name}/{unknown}")
        return vector if isinstance(vector, Vector) else zeros_like(like)

    moments = [tangent(name) for name in optimizer.moment_names]
    return tangent("w"), [part for parts in zip(*moments, strict=True) for part in parts]
