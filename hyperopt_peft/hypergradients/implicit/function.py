"""A solver from a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.implicit.solver import Matvec, Solution, Solver
from hyperopt_peft.utils.vector import Vector

#: A function (matvec, b) ↦ v ≈ H⁻¹b; ``matvec`` maps v to Hv, and all vectors are ``(n,)`` tensors.
SolverFunction = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class FunctionSolver(Solver):
    """A solver from a function ``(matvec, b) -> v``.

    ``b``, ``(n,)``, is a copy of ∂F/∂w for all lower variables in their order. A function that is
    given as an estimator is converted to this class with exact products;
    ``FunctionSolver(function, product="difference")`` takes first-order passes only.

    Raises:
        ProblemError: the function returns anything but a tensor ``(n,)``, or passes it to
        ``matvec``. NonFiniteError: v has an entry that is NaN or infinite.

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
        """v ≈ H⁻¹ b."""
        n = b.numel()

        def checked(v: Any, source: str) -> Vector:
            shape = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            self.require(shape == (n,), f"{source} a tensor of shape ({n},), like b, got {shape}")
            return b.with_entries(v.detach())

        def product(v: Tensor) -> Tensor:
            with torch.enable_grad():  # the function may run in no_grad
                return matvec(checked(v, "matvec takes")).flat()

        v = checked(self.function(product, b.flat().clone()), "the function must return")
        if not v.isfinite():
            raise NonFiniteError("the function's v has entries that are NaN or infinite")
        return Solution(v)
