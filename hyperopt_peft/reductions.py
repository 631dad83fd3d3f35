"""Numbers read back from tensors, with one transfer from the device each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyperopt_peft.graph import HALF


def read(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors."""
    if not scalars:
        return []
    if len({(x.dtype, x.device) for x in scalars}) > 1:
        scalars = [x.to(scalars[0].device, torch.float64) for x in scalars]
    values: list[float] = torch.stack(tuple(scalars)).tolist()
    return values


def sums(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The sum of each tensor, in float32 at least.

    It is finite if all entries are and it does not overflow, NaN or infinite if one of them is:
    far cheaper than a test of each entry.
    """
    return [x.detach().sum(dtype=_wide(x)) for x in tensors]


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite; see `sums`."""
    return all(map(math.isfinite, read(sums(tensors))))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Σ ⟨a_k, b_k⟩, each in float32 at least, their sum in float64."""
    return math.fsum(read([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]))


def norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all entries."""
    parts = [x.detach().to(_wide(x)) for x in tensors]
    squares = dot(parts, parts)
    if 1e-24 < squares < 1e24:
        return math.sqrt(squares)
    # Squares of float32 may have left its range; this is ten times slower.
    return math.hypot(*read([torch.linalg.vector_norm(x, dtype=torch.float64) for x in parts]))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in HALF else tensor.dtype
