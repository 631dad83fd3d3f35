"""The truncated Neumann series of the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt_peft.hypergradients.implicit.solver import (
    Matvec,
    Solution,
    Solver,
    power_iteration,
    read_finite,
)
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.validation import NonNegativeInt, PositiveFloat
from hyperopt_peft.utils.vector import Vector, inner, zeros_like

POWER_STEPS = 10  # of the power iteration for the largest eigenvalue


@register("neumann", kind="implicit", tolerance=0.15)
@dataclass(frozen=True)
class Neumann(Solver):
    """v = η Σ_{k=0}^{terms} (I − ηH)^k b, the series of H⁻¹ b truncated at the power ``terms``.

    For η ≤ 1/λmax the relative error is at most (1 − ημ)^(terms+1), where μ is the smallest and
    λmax the largest eigenvalue of H. The series diverges for η > 2/λmax. ``step_size`` is η; None
    sets η = 1/λmax, with λmax from ten steps of power iteration. Each term and each power step
    costs one Hessian-vector product. The residual, which would cost one more, is not reported.
    Lorraine, Vicol & Duvenaud 2020, arXiv:1911.02590 Eq. 8–9.

    Example:
        >>> from torch import tensor
        >>> h, b = Vector([tensor([1.0, 4.0])]), Vector([tensor([1.0, 1.0])])  # H = diag(1, 4)
        >>> Neumann(terms=1, step_size=0.25).solve(lambda v: h * v, b).v.parts  # v_1 = ¼ + ¼·¾
        (tensor([0.4375, 0.2500]),)
    """

    terms: NonNegativeInt = 20
    step_size: PositiveFloat | None = None

    def cost(self) -> int:
        """``terms`` products, and ten more without a ``step_size``."""
        power_steps = POWER_STEPS if self.step_size is None else 0
        return self.products_cost(self.terms + power_steps)

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ H⁻¹ b."""
        eta = self.step_size
        if eta is None:
            _, largest = power_iteration(matvec, b, POWER_STEPS)
            if largest == 0:
                return Solution(zeros_like(b), 1.0, 0, "the Hessian is zero along ∂F/∂w")
            eta = 1 / largest
        p, total = b.copy(), b.copy()  # p = (I − ηH)^k b, the residual of the sum of k terms
        for _ in range(self.terms):
            total.add_(p.add_(matvec(p), -eta))
        last, first = read_finite(inner(p, p), inner(b, b))
        note = f"the series diverges at step_size {eta:.3g}" if last > first else ""
        return Solution(total.mul_(eta), None, self.terms, note)
