"""The minimal residual method, a solver for indefinite Hessians."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hyperopt_peft.hypergradients.implicit.solver import Krylov, Matvec, Solution, read_finite
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.vector import Vector, inner, zeros_like


@register("minres", kind="implicit", tolerance=1e-2)
@dataclass(frozen=True)
class MINRES(Krylov):
    """v ≈ (H + damping·I)⁻¹ b, the v of least residual in a Krylov space of ``steps`` dimensions.

    H may be indefinite, as it is away from a minimum of f. The residual does not grow from step to
    step. The solver stops at relative residual ``tolerance``. It also stops at the least-squares
    solution of a singular H, and when the rounding of Hv is as large as the residual; ``note``
    reports both. Each step costs one Hessian-vector product. Lanczos tridiagonalisation with a QR
    factorisation by rotations (c, s): Paige & Saunders 1975, doi:10.1137/0712047.

    Example:
        >>> from torch import tensor
        >>> h, b = Vector([tensor([1.0, -4.0])]), Vector([tensor([1.0, 1.0])])  # H = diag(1, −4)
        >>> MINRES().solve(lambda v: h * v, b).v.parts
        (tensor([ 1.0000, -0.2500]),)
    """

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ (H + damping·I)⁻¹ b."""
        v, square = zeros_like(b), inner(b, b)
        lanczos, previous = b / square.sqrt(), zeros_like(b)  # orthonormal q_k, q_{k-1}
        start = residual = beta = largest = 0.0
        noise = 10 * self.rounding(b)
        direction, older = zeros_like(b), zeros_like(b)  # columns of Q R⁻¹
        (c, s), (c_older, s_older) = (1.0, 0.0), (1.0, 0.0)
        for step in range(self.steps):
            q = matvec(lanczos).plus(previous, -beta)
            if self.damping:
                q.add_(lanczos, self.damping)
            along = inner(lanczos, q)
            q.add_(lanczos, -along)
            alpha, of_q, of_b, of_v = read_finite(along, inner(q, q), square, inner(v, v))
            if step == 0:
                start = residual = math.sqrt(of_b)
            beta, beta_old = math.sqrt(of_q), beta
            # The new column (beta_old, alpha, beta) of the tridiagonal, rotated twice.
            epsilon, entry = s_older * beta_old, c_older * beta_old
            delta, gamma = c * entry + s * alpha, c * alpha - s * entry
            largest = max(largest, math.hypot(alpha, beta, beta_old))
            rho = math.hypot(gamma, beta)
            # Beyond this point v grows along the null space, and the recurrence loses its residual.
            if 0.3 * (floor := noise * largest * math.sqrt(of_v)) > abs(residual):
                note = "the residual has reached the rounding of Hv"
                return Solution(v, floor / start, step, note)
            # ‖Hr‖/‖r‖ is hypot(γ, cβ), zero at a least-squares solution.
            stationary = math.hypot(gamma, c * beta) <= max(self.tolerance, noise) * largest
            if stationary or rho <= noise * largest:
                note = "the Hessian is singular: least-squares solution"
                return Solution(v, abs(residual) / start, step, note)
            older.mul_add_(-epsilon, lanczos).add_(direction, -delta).mul_(1 / rho)
            direction, older = older, direction
            (c, s), (c_older, s_older) = (gamma / rho, beta / rho), (c, s)
            v.add_(direction, c * residual)
            residual = -s * residual
            if beta <= noise * largest or abs(residual) <= self.tolerance * start:
                return Solution(v, abs(residual) / start, step + 1)
            previous, lanczos = lanczos, q.mul_(1 / beta)
        return Solution(v, abs(residual) / start, self.steps)
