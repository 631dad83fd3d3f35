"""A random low-rank approximation of the Hessian, as a preconditioner or alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt_peft.hypergradients.estimator import Cost
from hyperopt_peft.hypergradients.implicit.cg import conjugate_gradients
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver, read_finite
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.vector import Vector, inner, machine_epsilon, normalised, zeros_like


@register("nystrom", kind="implicit", tolerance=1e-2)
@dataclass(frozen=True)
class Nystrom(Solver):
    """v ≈ (H + damping·I)⁻¹ b by ``steps`` steps of CG, preconditioned by H ≈ UΛUᵀ of ``rank`` k.

    With k random orthonormal columns Ω, drawn from ``seed`` alone,

        UΛUᵀ = (HΩ)(ΩᵀHΩ)⁻¹(HΩ)ᵀ
        P⁻¹  = U(Λ + damping)⁻¹Uᵀ + (I − UUᵀ)/(λ_k + damping)

    λ_k is the smallest eigenvalue found, so that P follows the scale of f. What the columns show
    of negative curvature is left out of P, which must be positive; CG ends where it meets some,
    as in ``cg``. ``steps=0`` is the approximation alone, v = (UΛUᵀ + damping·I)⁻¹ b by Woodbury's
    formula (damping None: v = P⁻¹b). That is good where H is damping·I but for k directions, and
    poor where eigenvalues fall slowly. At k = n both are exact.

    k Hessian-vector products, and one a step; up to 3k vectors. As a hypergradient: Hataya &
    Yamada 2023, arXiv:2302.09726; as a preconditioner: Frangella, Tropp & Udell 2021,
    arXiv:2110.02820.
    """

    rank: int = 10
    steps: int = 10
    damping: float | None = None
    tolerance: float = 1e-6
    seed: int = 0

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        self.require(self.rank >= 1, f"rank must be at least 1, got {self.rank}")
        self.require(self.steps >= 0, f"steps must not be negative, got {self.steps}")
        positive = self.damping is None or self.damping >= 0
        self.require(positive, f"damping must not be negative, got {self.damping}")
        self.require(0 <= self.tolerance < 1, f"tolerance must be in [0, 1), got {self.tolerance}")

    def cost(self) -> Cost:
        """``rank`` products, and at most ``steps``; 2·``rank`` vectors are U and HΩ."""
        return self.products_cost(self.rank + self.steps, vectors=8 + 2 * self.rank)

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ (H + damping·I)⁻¹ b."""
        values, vectors, note = _low_rank(matvec, _columns(b, self.rank, self.seed))
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
        return conjugate_gradients(
            matvec, b, self.steps, damping, self.tolerance, precondition=precondition
        )


def _columns(like: Vector, count: int, seed: int) -> list[Vector]:
    """Random orthonormal vectors, the same on every process; no more than there are dimensions."""
    generator, size = torch.Generator().manual_seed(seed), like.numel()
    numbers = (
        torch.randn(size, generator=generator, dtype=torch.float32) for _ in range(min(count, size))
    )
    return _orthonormal([like.with_entries(column) for column in numbers])


def _orthonormal(vectors: Sequence[Vector]) -> list[Vector]:
    """``vectors``, which are changed, made orthonormal in their order (Gram and Schmidt)."""
    result: list[Vector] = []
    for vector in vectors:
        for _ in range(2):  # once more, for orthogonality to rounding
            for other in result:
                vector.add_(other, -inner(other, vector))
        result.append(normalised(vector))
    return result


def _low_rank(matvec: Matvec, columns: Sequence[Vector]) -> tuple[list[float], list[Vector], str]:
    """Eigenvalues, largest first, and eigenvectors of the approximation; a note on the curvature.

    What is no larger than the square root of the rounding error counts as zero.
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
    note = f"negative curvature {least:.3g} left out" if least < -small * size else ""
    found = values > small * size
    half = basis[:, found] / values[found].sqrt()  # B = YΩ·half, with UΛUᵀ = BBᵀ
    squares, rotation = torch.linalg.eigh(half.T @ gram @ half)
    found = squares > small * size
    weights = (half @ rotation[:, found] / squares[found].sqrt()).flip(1)
    vectors = _orthonormal([_combination(images, column) for column in weights.T])
    return squares[found].flip(0).tolist(), vectors, note


def _combination(vectors: Sequence[Vector], weights: Tensor) -> Vector:
    result = zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights.tolist(), strict=True):
        result.add_(vector, weight)
    return result
