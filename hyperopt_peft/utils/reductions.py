"""Sums over many tensors, as scalar tensors on their device.

A read waits for the device, so that a solver reads at most once in each step: `to_floats`, the only
function that reads, transfers several scalars at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils.distributed import ShardLayout, is_sharded, to_local, totals

BLOCK = 2**16  # the number of entries that a CPU widens at a time; they stay in its cache


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


def squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Σ x² over the entries of each tensor, as float64 scalars.

    A sum is NaN or infinite if an entry is, and otherwise only if it overflows float64.
    """
    if not tensors:
        return []
    here = [x.detach() for x in to_local(tensors)]
    large = [x.is_cpu and x.numel() > BLOCK for x in here]
    small = [x for x, is_large in zip(here, large) if not is_large]
    norms = torch._foreach_norm(small, 2, torch.float64) if small else ()
    sums = iter(torch._foreach_mul(norms, norms) if small else ())
    values = [dot_product(x, x) if is_large else next(sums) for x, is_large in zip(here, large)]
    return _over_shards(values, tensors)


def total(scalars: Sequence[Tensor]) -> Tensor:
    """The sum of scalar tensors, in float64 on the device of the first scalar."""
    first, *others = scalars
    result = first.double()
    for other in others:
        result = result + other.to(result)
    return result


def dot_product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors, a float64 scalar; a CPU widens ``BLOCK`` entries at a time."""
    if b is a and not (a.is_cpu and a.numel() > BLOCK):
        return squares([a])[0]
    size = BLOCK if a.is_cpu else max(1, a.numel())
    of_a = (x.double() for x in a.detach().flatten().split(size))
    if b is a:
        return torch.stack([torch.dot(x, x) for x in of_a]).sum()
    of_b = (x.double() for x in b.detach().flatten().split(size))
    return torch.stack([torch.dot(x, y) for x, y in zip(of_a, of_b, strict=True)]).sum()


def norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all entries."""
    return math.sqrt(sum(to_floats(squares(list(tensors)))))


def _over_shards(values: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    return (
        totals(values, [ShardLayout.of(x).ranks for x in of]) if is_sharded(*of) else list(values)
    )
