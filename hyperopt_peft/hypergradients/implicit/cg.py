"""Conjugate gradients on the Hessian system."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt_peft.hypergradients.implicit.solver import Krylov, Matvec, Solution, require_finite
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, inner, zeros_like


@register("cg", kind="implicit", tolerance=1e-2)
@dataclass(frozen=True)
class ConjugateGradient(Krylov):
    """v ≈ (H + damping·I)⁻¹ b by at most ``steps`` conjugate-gradient steps.

    The solver stops at relative residual ``tolerance``. It also stops at a curvature that is zero
    (to rounding) or negative; ``note`` reports the curvature, and v is the iterate of least
    residual. Each step costs one Hessian-vector product. Hestenes & Stiefel 1952,
    doi:10.6028/jres.049.044; as a hypergradient: Pedregosa 2016, arXiv:1602.02355.

    Example:
        >>> from torch import tensor
        >>> h, b = Vector([tensor([1.0, 4.0])]), Vector([tensor([1.0, 1.0])])  # H = diag(1, 4)
        >>> ConjugateGradient().solve(lambda v: h * v, b).v.parts
        (tensor([1.0000, 0.2500]),)
    """

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ (H + damping·I)⁻¹ b."""
        limits = self.steps, self.damping, self.tolerance, self.rounding(b)
        return conjugate_gradients(matvec, b, *limits)


def conjugate_gradients(
    matvec: Matvec,
    b: Vector,
    steps: int,
    damping: float,
    tolerance: float,
    rounding: float,
    *,
    precondition: Matvec | None = None,
) -> Solution:
    """v ≈ (H + damping·I)⁻¹ b; ``precondition`` applies a positive definite P⁻¹, None the identity.

    ``rounding`` is the relative error of a product (`Solver.rounding`), and ``rounding``·λ·Σα‖p‖
    over ‖b‖ the least residual that is reported, since the recursion's falls further than v's own.
    Each step reads from the device once, after v has moved: the curvature and the new residual. If
    the curvature is not positive, the result is the best iterate before the step. Two vectors hold
    v and the best iterate; without ``precondition`` ‖p‖² follows from r ⊥ p.
    """
    v = best = zeros_like(b)
    other, r = zeros_like(b), b.copy()
    z = r if precondition is None else precondition(r)
    p, square = z.copy(), inner(r, r)
    rho = square if z is r else inner(r, z)
    length = square if z is r else inner(p, p)
    path, unread, start, least, largest = square * 0, [square], 0.0, 0.0, 0.0
    for step in range(steps):
        q = matvec(p)
        if damping:
            q.add_(p, damping)
        along = inner(p, q)
        alpha = rho / along
        path = path + alpha * length.sqrt()
        v = v.plus(p, alpha, out=other)
        r.add_(q, -alpha)
        z = r if precondition is None else precondition(r)
        square = inner(r, r)
        rho, previous = square if z is r else inner(r, z), rho
        read = to_floats([along, length, square, path, *unread])
        p_hp, p_p, residual_square, distance, *initial = read
        if initial:
            unread, (start,) = [], initial
            least = start
        if p_p == 0:  # b or z is zero to rounding, and v is 0/0
            return Solution(best, (least / start) ** 0.5 if start else 0.0, step)
        require_finite(p_hp, p_p)
        curvature = p_hp / p_p
        largest = max(largest, abs(curvature))
        if curvature <= 10 * rounding * largest:  # the step is invalid
            kind = "negative" if curvature < 0 else "zero"
            note = f"{kind} curvature {curvature:.3g} at step {step + 1}"
            return Solution(best, (least / start) ** 0.5, step, note)
        require_finite(residual_square)
        if residual_square <= tolerance**2 * start or step + 1 == steps:
            break
        if residual_square < least:
            best, other, least = v, best, residual_square
        beta = rho / previous
        p.mul_add_(beta, z)
        length = rho + beta * beta * length if z is r else inner(p, p)
    floor = rounding * largest * distance
    return Solution(v, max(residual_square**0.5, floor) / start**0.5, step + 1)
