"""Linear systems H·v = b of known spectrum, as solvers take them."""

import torch
from torch import Tensor

from hyperopt_peft.hypergradients import Matvec, Vector
from tests.support.quadratic import flat, leaves, symmetric


def system(h: Tensor, seed: int = 0) -> tuple[Matvec, Vector, Tensor]:
    """Matrix-vector product and right-hand side of two leaves, and the latter flat."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(len(h), dtype=h.dtype, generator=generator)
    vector = Vector(leaves(b, [(len(h) - 1,), ()] if len(h) > 1 else [()]))
    return lambda v: v.with_entries(h @ v.flat()), vector, b


def residual(h: Tensor, v: Vector, b: Tensor) -> float:
    return float((b - h @ flat(v)).norm() / b.norm())


def indefinite(n: int, seed: int) -> Tensor:
    """Eigenvalues of both signs, of modulus 1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.ones(n, dtype=torch.float64)
    signs[::2] = -1
    return symmetric(signs * torch.linspace(1, 10, n, dtype=torch.float64), generator)
