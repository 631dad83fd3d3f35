"""Sums over many tensors that stay on their device, and the one function that reads numbers back.

A read waits for the device, so a solver has at most one a step: sums are scalar tensors, and
`to_floats` brings several of these over at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils.autograd import HALF
from hyperopt_peft.utils.distributed import ShardLayout, is_sharded, to_local, totals

BLOCK = 2**15  # entries that a CPU widens at a time, which then stay in its cache
SINGLE_BLOCK = 2**20  # entries whose products are summed in float32, to some six digits
# Between these, a sum of float32 products has lost nothing to underflow, and has not overflowed.
SINGLE_RANGE = 1e-20, 1e38


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors, by one transfer from the device."""
    if not scalars:
        return []
    if len({(x.dtype, x.device) for x in scalars}) > 1:
        scalars = [x.to(scalars[0].device, torch.float64) for x in scalars]
    values: list[float] = torch.stack(tuple(scalars)).tolist()
    return values


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    tensors = list(tensors)
    return not any(
        to_floats(_over_shards([(~x.isfinite()).sum() for x in to_local(tensors)], tensors))
    )


def squares(tensors: Sequence[Tensor], *, wide: bool = True) -> list[Tensor]:
    """Σ x² over the entries of each tensor, scalars in float64.

    One is NaN or infinite if an entry is, and otherwise only where float64 cannot hold the square.
    If not ``wide``, the sums are in float32 where the entries are: a CPU takes a fifth of the time,
    to some five digits, and a square beyond float32's range is 0 or infinite.
    """
    if not tensors:
        return []
    here = [x.detach() for x in to_local(tensors)]
    if not wide:
        here = [x.float() if x.dtype in HALF else x for x in here]
    norms = torch._foreach_norm(here, 2, torch.float64 if wide else None)
    return _over_shards(torch._foreach_mul(norms, norms), tensors)


def summed(scalars: Sequence[Tensor]) -> Tensor:
    """The sum of scalar tensors, in float64 on the device of the first."""
    first, *others = scalars
    result = first.double()
    for other in others:
        result = result + other.to(result)
    return result


def dot_product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors, a scalar in float64.

    Products of many float32 entries are summed in float32 on a CPU, which takes a third of the
    time, and again in float64 where the result is not in ``SINGLE_RANGE``. The error is then below
    that of the entries' own rounding.
    """
    on_cpu = a.device.type == "cpu"
    if b is a and not on_cpu:  # widened entry by entry, which a product of two tensors is not
        length: Tensor = torch.linalg.vector_norm(a.detach(), dtype=torch.float64)
        return length.square()
    a, b = a.detach().flatten(), b.detach().flatten()
    if a.dtype == torch.float64 or not on_cpu or len(a) <= BLOCK:
        return torch.dot(a.double(), b.double())
    if a.dtype == b.dtype == torch.float32:
        single = _blockwise_dot(a, b, SINGLE_BLOCK, torch.float32)
        least, most = SINGLE_RANGE
        if least < abs(single.item()) < most:  # no wait, since the number is on the CPU
            return single
    return _blockwise_dot(a, b, BLOCK, torch.float64)


def norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all entries."""
    return math.sqrt(sum(to_floats(squares(list(tensors)))))


def _blockwise_dot(a: Tensor, b: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """⟨a, b⟩ by products in ``dtype`` of a block at a time, whose sums are added in float64."""
    pairs = zip(a.split(block), b.split(block))
    return torch.stack([torch.dot(x.to(dtype), y.to(dtype)) for x, y in pairs]).double().sum()


def _over_shards(values: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    return (
        totals(values, [ShardLayout.of(x).ranks for x in of]) if is_sharded(*of) else list(values)
    )
