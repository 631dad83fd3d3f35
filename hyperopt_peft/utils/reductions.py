"""Numbers read back from tensors, with one transfer from the device each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils.autograd import HALF
from hyperopt_peft.utils.distributed import to_local, total


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors."""
    if not scalars:
        return []
    if len({(x.dtype, x.device) for x in scalars}) > 1:
        scalars = [x.to(scalars[0].device, torch.float64) for x in scalars]
    values: list[float] = torch.stack(tuple(scalars)).tolist()
    return values


def sums(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The sum of each tensor's local part, in float32 at least.

    It is NaN or infinite if an entry is, and otherwise only where it overflows: a test far
    cheaper than that of each entry.
    """
    return [x.detach().sum(dtype=_wide(x)) for x in to_local(tensors)]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    tensors = list(tensors)
    if math.isfinite(total(to_floats(sums(tensors)), tensors)):
        return True
    return total(to_floats([(~x.isfinite()).sum() for x in to_local(tensors)]), tensors) == 0


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Σ ⟨a_k, b_k⟩, in blocks of float32 at least whose sums are added in float64."""
    pairs = [(x.flatten(), y.flatten()) for x, y in zip(to_local(a), to_local(b), strict=True)]
    blocks = [
        (whole, x, y)
        for whole, pair in zip(a, pairs)
        for x, y in zip(*map(_blocks, pair), strict=True)
    ]
    result = total(
        to_floats([torch.dot(x, y) for _, x, y in blocks]), [whole for whole, *_ in blocks]
    )
    if 1e-24 < abs(result) < 1e24:
        return result
    # The products may have left the range of float32; this is ten times slower.
    return total(to_floats([torch.dot(x.double(), y.double()) for x, y in pairs]), a)


def norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all entries."""
    parts = [x.detach().to(_wide(x)) for x in tensors]
    return math.sqrt(dot(parts, parts))


def _blocks(vector: Tensor) -> Sequence[Tensor]:
    """Parts short enough for a CPU's float32 sum; a GPU sums in a tree."""
    return vector.split(2**16) if vector.device.type == "cpu" else (vector,)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in HALF else tensor.dtype
