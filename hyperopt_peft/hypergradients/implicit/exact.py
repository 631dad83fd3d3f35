"""The dense solve, a reference for the other estimators."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver, read_finite
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.utils.reductions import to_floats
from hyperopt_peft.utils.validation import NonNegativeFloat
from hyperopt_peft.utils.vector import Vector

LARGEST = 5000  # the most unknowns; a float64 Hessian of this size takes 200 MB


@register("exact", kind="implicit", tolerance=1e-9)
@dataclass(frozen=True)
class Exact(Solver):
    """v = (H + damping·I)⁻¹ b from the eigenvalues of the dense Hessian.

    With n lower unknowns, the columns of H are n Hessian-vector products. H is symmetrised and
    decomposed in float64. If H is singular and b has no component in its null space, v is the
    solution of least norm. The cost is n products and memory for n² numbers. Bengio 2000,
    doi:10.1162/089976600300015187.

    Raises:
        ProblemError: n exceeds 5,000, or H is singular along b.

    Example:
        >>> h, b = Vector([torch.tensor([1.0, 4.0])]), Vector([torch.ones(2)])  # H = diag(1, 4)
        >>> Exact().solve(lambda v: h * v, b).v.parts
        (tensor([1.0000, 0.2500]),)
    """

    damping: NonNegativeFloat = 0.0

    def check_levels(self, upper: Problem, lower: Problem) -> None:
        """Raise ProblemError if the lower level has more than 5,000 unknowns."""
        n = sum(variable.numel() for variable in lower.variables)
        self.require(
            n <= LARGEST,
            f"{lower.name} has {n} unknowns, and a dense Hessian at most {LARGEST}; use "
            '"cg:steps=100,tolerance=1e-10"',
        )

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v = (H + damping·I)⁻¹ b."""
        n = b.numel()
        rhs = b.flat()
        columns = [matvec(b.with_entries(unit)).flat() for unit in torch.eye(n).to(rhs)]
        hessian = (torch.stack(columns) + torch.stack(columns, dim=1)) / 2
        read_finite(hessian.sum())
        hessian, rhs = hessian.double(), rhs.double()
        hessian.diagonal().add_(self.damping)
        values, vectors = torch.linalg.eigh(hessian)
        rhs = vectors.T @ rhs
        noise = self.rounding(b)
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
