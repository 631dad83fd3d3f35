"""The dense solve, the reference for every other estimator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver, read_finite
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.vector import Vector, machine_epsilon


@register("exact", kind="implicit", tolerance=1e-9)
@dataclass(frozen=True)
class Exact(Solver):
    """v = (H + damping·I)⁻¹ b from the eigenvalues of the dense Hessian.

    The n columns of H are Hessian-vector products, n the number of lower unknowns. H is
    symmetrised and decomposed in float64, or in the variables' precision with ``float64=False``.
    If H is singular and b has no component in its null space, v is the solution of least norm.
    Time grows as n products, memory as n². Bengio 2000, doi:10.1162/089976600300015187.

    Raises:
        ProblemError: n exceeds ``max_size``, or H is singular along b.

    Example:
        >>> h, b = Vector([torch.tensor([1.0, 4.0])]), Vector([torch.ones(2)])  # H = diag(1, 4)
        >>> Exact().solve(lambda v: h * v, b).v.parts
        (tensor([1.0000, 0.2500]),)
    """

    damping: float = 0.0
    float64: bool = True
    max_size: int = 5000

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        self.require(self.damping >= 0, f"damping must not be negative, got {self.damping}")
        self.require(self.max_size >= 1, f"max_size must be at least 1, got {self.max_size}")

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """As `Estimator.check_levels`; the lower level must have at most ``max_size`` unknowns."""
        super().check_levels(upper, lower)
        n = sum(variable.numel() for variable in lower.variables)
        self.require(
            n <= self.max_size,
            f"{lower.name} has {n} unknowns, more than max_size={self.max_size}; use "
            '"cg:steps=100", or raise max_size',
        )

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v = (H + damping·I)⁻¹ b."""
        n = b.numel()
        rhs = b.flat()
        columns = [matvec(b.with_entries(unit)).flat() for unit in torch.eye(n).to(rhs)]
        hessian = (torch.stack(columns) + torch.stack(columns, dim=1)) / 2
        read_finite(hessian.sum())
        if self.float64:
            hessian, rhs = hessian.double(), rhs.double()
        hessian.diagonal().add_(self.damping)
        values, vectors = torch.linalg.eigh(hessian)
        rhs = vectors.T @ rhs
        noise = machine_epsilon(b)
        null = values.abs() <= n * noise * values.abs().max()
        solution = torch.where(null, 0, rhs / values.where(~null, torch.ones_like(values)))
        norms = [x.norm() for x in (rhs * null, rhs, rhs - values * solution)]
        missed, length, residual, rank = to_floats([*norms, (~null).sum()])
        if missed > noise**0.5 * length:
            raise ProblemError(
                "exact: the lower Hessian is singular along ∂F/∂w; regularise the lower loss, add "
                "damping, or remove a lower variable that the loss does not read"
            )
        note = f"the Hessian has rank {rank:.0f} of {n}" if rank < n else ""
        return Solution(b.with_entries(vectors @ solution), residual / length, n, note)
