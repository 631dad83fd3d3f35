"""Sums over the entries of tensors, and the read of their values.

A read from the device waits for all earlier operations. So sums are scalar tensors on the device,
and `to_floats` reads several of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils.distributed import Form, to_local, totals

BLOCK = 2**14  # entries that a CPU converts to float64 at a time, so that they stay in its cache


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors, by one read from the device."""
    if not scalars:
        return []
    if len({(x.dtype, x.device) for x in scalars}) > 1:
        scalars = [x.to(scalars[0].device, torch.float64) for x in scalars]
    values: list[float] = torch.stack(tuple(scalars)).tolist()
    return values


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    tensors = list(tensors)
    return not any(to_floats(_whole([(~x.isfinite()).sum() for x in to_local(tensors)], tensors)))


def squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Σ x² over the entries of each tensor, a float64 scalar on the tensor's device.

    A sum is NaN or infinite if an entry is, or if the sum overflows float64.
    """
    if not tensors:
        return []
    norms = torch._foreach_norm([x.detach() for x in to_local(tensors)], 2, torch.float64)
    return _whole([x.square() for x in norms], tensors)


def summed(scalars: Sequence[Tensor]) -> Tensor:
    """The float64 sum of scalar tensors, on the device of the first."""
    first, *others = scalars
    result = first.double()
    for other in others:
        result = result + other.to(result)
    return result


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two tensors, a scalar summed in float64 against overflow and rounding."""
    a, b = a.detach().flatten(), b.detach().flatten()
    if a.dtype == torch.float64 or a.device.type != "cpu" or len(a) <= BLOCK:
        return _wide_dot(a, b)
    return torch.stack([_wide_dot(*pair) for pair in zip(a.split(BLOCK), b.split(BLOCK))]).sum()


def norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all entries of ``tensors``."""
    return math.sqrt(sum(to_floats(squares(list(tensors)))))


def _wide_dot(a: Tensor, b: Tensor) -> Tensor:
    wide = a.double()
    return torch.dot(wide, wide if b is a else b.double())


def _whole(values: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    return totals(values, [Form.of(x).holders for x in of])
