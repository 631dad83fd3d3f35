"""Gradients by central differences of a value."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradient(
    value: Callable[[Tensor], Any],
    count: int,
    step: float = 1e-3,
    entries: Iterable[int] | None = None,
) -> Tensor:
    """The gradient at 0 of ``value``, a function of a displacement ``(count,)``, to O(step⁴)."""

    def slope(entry: int) -> float:
        unit = torch.zeros(count, dtype=torch.float64)
        unit[entry] = step
        near, far = (float(value(k * unit)) - float(value(-k * unit)) for k in (1, 2))
        return (8 * near - far) / (12 * step)

    entries = range(count) if entries is None else entries
    return torch.tensor([slope(entry) for entry in entries], dtype=torch.float64)


@torch.no_grad()
def displace(variables: Sequence[Tensor], shift: Tensor) -> None:
    """Add ``shift`` to the ``variables``, in their order."""
    for x, part in zip(variables, shift.split([x.numel() for x in variables]), strict=True):
        x += part.view_as(x)
