"""Random chains of quadratic levels in float64, whose hypergradient has a closed form.

Level k owns the block x_k of z = (x_0, …, x_{n−1}) and minimises over it

    f_k(z) = ½ zᵀA_k z + a_kᵀz,   A_k symmetric and positive definite, coupling all blocks.

From below: where z = S y + s with y = (x_0, …, x_k), the reduced f_k has the Hessian M = SᵀA_kS,
and x_k* = −M_kk⁻¹ M_k,<k (x_0, …, x_{k−1}) + constant gives the next S. On top dF/dx_0 is
Sᵀ(A_0 z + a_0), at any z: the formula of implicit differentiation wherever the levels are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft import Nested
from tests.support.quadratic import FunctionLevel, positive

SIZES = (3, 4, 5, 2)


@dataclass
class Chain:
    matrices: list[Tensor]
    vectors: list[Tensor]
    blocks: list[Tensor]  # the leaves, from above

    def objective(self, k: int, blocks: Any) -> Any:
        z = torch.cat(list(blocks))
        return z @ self.matrices[k] @ z / 2 + self.vectors[k] @ z

    def levels(self, lr: float = 0.05, data: Any = None) -> list[Any]:
        made = []
        for k, x in enumerate(self.blocks):
            function = lambda _, k=k: self.objective(k, self.blocks)  # noqa: E731
            made.append(FunctionLevel(function, [x], lr=lr, data=data, name=f"level {k}"))
        return made

    def reductions(self) -> tuple[Any, ...]:
        """(S, s) for z as a function of x_0; and x_0, …, x_k at each level's minimum."""
        sizes = [len(x) for x in self.blocks]
        n = sum(sizes)
        basis, offset = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        for k in reversed(range(1, len(sizes))):
            above = sum(sizes[:k])
            m = basis.T @ self.matrices[k] @ basis
            r = basis.T @ (self.matrices[k] @ offset + self.vectors[k])
            slope = -torch.linalg.solve(m[above:, above:], m[above:, :above])
            point = -torch.linalg.solve(m[above:, above:], r[above:])
            offset = offset + basis[:, above:] @ point
            basis = basis[:, :above] + basis[:, above:] @ slope
        return basis, offset

    @torch.no_grad()
    def hypergradient(self) -> Any:
        """dF/dx_0 at the current point."""
        z = torch.cat(self.blocks)
        return self.reductions()[0].T @ (self.matrices[0] @ z + self.vectors[0])

    @torch.no_grad()
    def settle(self) -> None:
        """Move every level but the top one to its minimum."""
        basis, offset = self.reductions()
        parts = (basis @ self.blocks[0] + offset).split([len(x) for x in self.blocks])
        for x, part in zip(self.blocks, parts, strict=True):
            x.copy_(part)

    @torch.no_grad()
    def optimum(self) -> Any:
        """x_0, …, x_{n−1} at the optimum of the whole chain."""
        basis, offset = self.reductions()
        m = basis.T @ self.matrices[0] @ basis
        r = basis.T @ (self.matrices[0] @ offset + self.vectors[0])
        z = basis @ -torch.linalg.solve(m, r) + offset
        return z.split([len(x) for x in self.blocks])


def chain(levels: int, seed: int = 0, sizes: Any = SIZES, ridge: float = 0.0) -> Chain:
    """A random chain, no level of which is at its minimum; ``ridge`` makes it less coupled."""
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes[:levels]
    n = sum(sizes)

    def normal(size: Any) -> Any:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    return Chain(
        [positive(n, generator) + ridge * torch.eye(n, dtype=torch.float64) for _ in sizes],
        [normal(n) for _ in sizes],
        [normal(size).requires_grad_() for size in sizes],
    )


def nested(
    levels: int,
    lowest: str = "exact",
    above: str = "exact:product=difference,epsilon=1.0",
    **options: Any,
) -> tuple[Any, ...]:
    """The top level, and those below it as one; ``lowest`` and ``above`` are their estimators."""
    top, *middle, lower = levels
    for level in reversed(middle):
        lower = Nested(level, lower, above if lower.nested else lowest, **options)
    return top, lower
