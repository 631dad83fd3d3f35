"""A function as a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver
from hyperopt_peft.utils.vector import Vector

#: v ≈ H⁻¹b from ``matvec``, a function v ↦ Hv, and b; all are tensors of shape ``(n,)``.
SolverFunction = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class FunctionSolver(Solver):
    """A solver that is a function ``(matvec, b) -> v``.

    ``b`` has the entries of ∂F/∂w for all lower variables in their order, ``(n,)``, and belongs to
    the function. A function in the place of an estimator is converted to this class, with exact
    products; ``FunctionSolver(function, product="difference")`` takes first-order passes only.

    Raises:
        ProblemError: the function gives ``matvec``, or returns, anything but a tensor ``(n,)``.
        NonFiniteError: v has an entry that is NaN or infinite.

    Example:
        >>> from hyperopt_peft import hypergradient
        >>> from hyperopt_peft.problems.textbook.ridge import diabetes
        >>> upper, lower = diabetes()
        >>> half, = hypergradient(upper, lower, lambda matvec, b: 0.5 * b)
        >>> half.allclose(hypergradient(upper, lower, "darts:xi=0.5")[0])
        True
    """

    function: SolverFunction

    @property
    def name(self) -> str:  # type: ignore[override]
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __repr__(self) -> str:
        options = "" if self.product == "exact" else f", product={self.product!r}"
        return f"{self.name}(matvec, b{options})"

    def solve(self, matvec: Matvec, b: Vector) -> Solution:
        """v ≈ H⁻¹ b, by the function."""
        n = b.numel()

        def checked(v: Any, source: str) -> Vector:
            shape = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            self.require(shape == (n,), f"{source} a tensor of shape ({n},), like b, got {shape}")
            return b.with_entries(v.detach())

        def product(v: Tensor) -> Tensor:
            with torch.enable_grad():  # the function may run without
                return matvec(checked(v, "matvec takes")).flat()

        v = checked(self.function(product, b.flat().clone()), "the function must return")
        if not v.isfinite():
            raise NonFiniteError("the function's v has entries that are NaN or infinite")
        return Solution(v)
