"""The dense solve: the reference for every other estimator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hyperopt_peft.errors import ProblemError
from hyperopt_peft.hypergradients.estimator import Matvec, Solution, Solver
from hyperopt_peft.hypergradients.registry import register
from hyperopt_peft.hypergradients.vector import Vector


@register("exact", kind="implicit", tolerance=1e-9)
@dataclass(frozen=True)
class Exact(Solver):
    """v = (H + damping·I)⁻¹ b by an LU solve with the dense Hessian.

    The Hessian is built from one Hessian-vector product for each of the n lower unknowns,
    symmetrised, and solved in float64 (``float64=False``: in the variables' precision).
    More than ``max_size`` unknowns are refused: time grows as n products, memory as n².
    The textbook form of the implicit function theorem (Bengio 2000,
    doi:10.1162/089976600300015187).

    Raises:
        ProblemError: n exceeds ``max_size``, or the Hessian is singular.
    """

    damping: float = 0.0
    float64: bool = True
    max_size: int = 5000

    def check(self) -> None:
        """Check the ranges of the options."""
        super().check()
        self.require(self.damping >= 0, f"damping must not be negative, got {self.damping}")

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v = (H + damping·I)⁻¹ b."""
        n = b.numel()
        if n > self.max_size:
            raise ProblemError(
                f"exact: the lower level has {n} unknowns, more than max_size={self.max_size}; "
                'use "cg:steps=100", or raise max_size'
            )
        rhs = b.flat()
        columns = [matvec(b.with_entries(unit)).flat() for unit in torch.eye(n).to(rhs)]
        hessian = (torch.stack(columns) + torch.stack(columns, dim=1)) / 2
        if self.float64:
            hessian, rhs = hessian.double(), rhs.double()
        hessian.diagonal().add_(self.damping)
        solution, info = torch.linalg.solve_ex(hessian, rhs)
        if info or not torch.isfinite(solution).all():
            raise ProblemError(
                "exact: the lower Hessian is singular; regularise the lower loss, add damping, "
                "or look for a lower variable that the loss does not read"
            )
        residual = (rhs - hessian @ solution).norm() / rhs.norm()
        return Solution(b.with_entries(solution), float(residual), n)
