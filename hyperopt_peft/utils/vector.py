"""Vectors over several tensors, with the arithmetic that a linear solver needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils import reductions
from hyperopt_peft.utils.autograd import HALF
from hyperopt_peft.utils.distributed import gather, sharded_like, to_local


class Vector:
    """A point of the product space of some tensors: one part for each.

    Parts keep their shape and device; half-precision parts are widened to float32, since a
    solver's recurrences lose their meaning at eight bits. Operators give new vectors; methods that
    end in an underscore change this one, which must own its memory (`copy`, `zeros_like`).
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self.parts = tuple(widened(part.detach()) for part in parts)

    @classmethod
    def of(cls, gradient: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
        """``gradient`` with zeros where it is None."""
        return cls(
            torch.zeros_like(tensor) if part is None else part
            for part, tensor in zip(gradient, like, strict=True)
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __add__(self, other: Vector) -> Vector:
        return Vector(a + b for a, b in zip(self.parts, other.parts, strict=True))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(a - b for a, b in zip(self.parts, other.parts, strict=True))

    def __mul__(self, factor: float | Tensor | Vector) -> Vector:
        """With a number, or entry by entry with another vector."""
        if isinstance(factor, Vector):
            return Vector(a * b for a, b in zip(self.parts, factor.parts, strict=True))
        return Vector(part * factor for part in self.parts)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Vector:
        return Vector(part / divisor for part in self.parts)

    def __neg__(self) -> Vector:
        return Vector(-part for part in self.parts)

    def copy(self) -> Vector:
        """The same point in memory of its own."""
        return Vector(part.clone() for part in self.parts)

    def add_(self, other: Vector, factor: float = 1.0) -> Vector:
        """This vector becomes self + factor·other."""
        torch._foreach_add_(to_local(self), to_local(other), alpha=factor)
        return self

    def mul_(self, factor: float) -> Vector:
        """This vector becomes factor·self."""
        torch._foreach_mul_(to_local(self), factor)
        return self

    def copy_(self, other: Vector) -> Vector:
        """This vector becomes equal to ``other``."""
        torch._foreach_copy_(to_local(self), to_local(other))
        return self

    def norm(self) -> float:
        """The 2-norm."""
        return reductions.norm(self.parts)

    def numel(self) -> int:
        """The dimension of the space."""
        return sum(part.numel() for part in self.parts)

    def flat(self) -> Tensor:
        """All parts as one ``(numel,)`` tensor on the first part's device."""
        device = self.parts[0].device
        return torch.cat([gather(part).reshape(-1).to(device) for part in self.parts])

    def with_entries(self, flat: Tensor) -> Vector:
        """A vector of this shape with the entries of ``flat``, a ``(numel,)`` tensor."""
        chunks = flat.split([part.numel() for part in self.parts])
        return Vector(sharded_like(x.reshape(p.shape), p) for x, p in zip(chunks, self.parts))

    def isfinite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return reductions.all_finite(self.parts)


def dot(a: Vector, b: Vector) -> float:
    """⟨a, b⟩; the parts' sums are added in float64."""
    return reductions.dot(a.parts, b.parts)


def machine_epsilon(vector: Vector) -> float:
    """The relative rounding error of the vector's coarsest part."""
    return max(float(torch.finfo(part.dtype).eps) for part in vector)


def zeros_like(vector: Vector) -> Vector:
    """The zero of the vector's space."""
    return Vector(torch.zeros_like(part) for part in vector.parts)


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 where it is in half precision, itself otherwise."""
    return tensor.float() if tensor.dtype in HALF else tensor
