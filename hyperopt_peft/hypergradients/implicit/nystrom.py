"""A random low-rank approximation of the Hessian, as a preconditioner or as the solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hyperopt_peft.hypergradients.implicit.cg import conjugate_gradients
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver, read_finite
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.validation import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon, normalised, zeros_like


@register("nystrom", kind="implicit", tolerance=1e-2)
@dataclass(frozen=True)
class Nystrom(Solver):
    """v ≈ (H + damping·I)⁻¹ b by ``steps`` steps of CG, preconditioned by H ≈ UΛUᵀ of ``rank`` k.

    Ω has k random orthonormal columns, equal at every upper step, and Λ = diag(λ_1, …, λ_k):

        UΛUᵀ = (HΩ)(ΩᵀHΩ)⁻¹(HΩ)ᵀ
        P⁻¹  = U(Λ + damping)⁻¹Uᵀ + (I − UUᵀ)/(λ_k + damping)

    λ_k is the smallest eigenvalue in Λ, so that P scales with f. Λ omits negative eigenvalues,
    since P must be positive definite; CG stops at negative curvature, as in ``cg``. With
    ``steps=0`` the estimate is v = (UΛUᵀ + damping·I)⁻¹ b by Woodbury's formula, or P⁻¹b if
    ``damping`` is None. This v is exact for k = n, accurate if H is damping·I except in k
    directions, and inaccurate if the eigenvalues decay slowly.

    The cost is k Hessian-vector products, one more for each step, and memory for 3k vectors. As a
    hypergradient: Hataya & Yamada 2023, arXiv:2302.09726; as a preconditioner: Frangella, Tropp &
    Udell 2021, arXiv:2110.02820.

    Example:
        >>> h, b = Vector([torch.tensor([1.0, 4.0])]), Vector([torch.ones(2)])  # H = diag(1, 4)
        >>> Nystrom(rank=2, steps=0).solve(lambda v: h * v, b).v.parts
        (tensor([1.0000, 0.2500]),)
    """

    rank: PositiveInt = 10
    steps: NonNegativeInt = 10
    damping: NonNegativeFloat | None = None
    tolerance: Fraction = 1e-6

    def cost(self) -> int:
        """The cost of ``rank`` products, and ``steps`` more at most."""
        return self.products_cost(self.rank + self.steps)

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ (H + damping·I)⁻¹ b."""
        values, vectors, note = _low_rank(matvec, _columns(b, self.rank))
        damping = self.damping or 0.0
        floor = (values[-1] if values else 0.0) + damping

        def inverse(r: Vector, floor: float) -> Vector:
            """[U(Λ + damping)⁻¹Uᵀ + (I − UUᵀ)/floor] r."""
            result = r / floor
            for value, u in zip(values, vectors, strict=True):
                result.add_(u, inner(u, r) * (1 / (value + damping) - 1 / floor))
            return result

        if self.steps == 0:
            floor = self.damping or floor
            return Solution(inverse(b, floor) if floor else zeros_like(b), None, 0, note)
        precondition = (lambda r: inverse(r, floor)) if values else None
        limits = self.steps, damping, self.tolerance, self.rounding(b)
        return conjugate_gradients(matvec, b, *limits, precondition=precondition)


def _columns(like: Vector, count: int) -> list[Vector]:
    """``count`` random orthonormal vectors, at most n, equal on every process."""
    generator, size = torch.Generator().manual_seed(0), like.numel()
    numbers = (
        torch.randn(size, generator=generator, dtype=torch.float32) for _ in range(min(count, size))
    )
    return _orthonormal([like.with_entries(column) for column in numbers])


def _orthonormal(vectors: Sequence[Vector]) -> list[Vector]:
    """``vectors`` made orthonormal by Gram–Schmidt, in place."""
    result: list[Vector] = []
    for vector in vectors:
        for _ in range(2):  # twice, for orthogonality to rounding
            for other in result:
                vector.add_(other, -inner(other, vector))
        result.append(normalised(vector))
    return result


def _low_rank(matvec: Matvec, columns: Sequence[Vector]) -> tuple[list[float], list[Vector], str]:
    """The eigenvalues of UΛUᵀ, largest first, its eigenvectors, and a note on negative curvature.

    An eigenvalue below √δ·|λ|max counts as zero, δ the machine epsilon.
    """
    images = [matvec(column) for column in columns]
    small = machine_epsilon(columns[0]) ** 0.5
    k = len(columns)
    products = [inner(x, y) for x in (*columns, *images) for y in images]
    core, gram = torch.tensor(read_finite(*products), dtype=torch.float64).view(2, k, k)
    values, basis = torch.linalg.eigh((core + core.T) / 2)
    least, size = float(values[0]), float(values.abs().max())
    if size == 0:
        return [], [], "the Hessian is zero along all columns"
    note = f"negative curvature {least:.3g} omitted" if least < -small * size else ""
    large = values > small * size
    half = basis[:, large] / values[large].sqrt()  # B = YΩ·half, with UΛUᵀ = BBᵀ
    squares, rotation = torch.linalg.eigh(half.T @ gram @ half)
    large = squares > small * size
    weights = (half @ rotation[:, large] / squares[large].sqrt()).flip(1)
    combinations = [zeros_like(columns[0]) for _ in weights.T]
    for image, factors in zip(images, weights.tolist(), strict=True):
        for combination, factor in zip(combinations, factors, strict=True):
            combination.add_(image, factor)
    vectors = _orthonormal(combinations)
    return squares[large].flip(0).tolist(), vectors, note
