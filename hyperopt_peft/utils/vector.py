"""Vectors over several tensors, with the arithmetic that a linear solver needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils import reductions
from hyperopt_peft.utils.autograd import HALF
from hyperopt_peft.utils.distributed import Form, gather, sharded_like, to_local, totals


class Space:
    """How the parts of a vector lie in its buffers: one buffer for each dtype and device.

    Of a sharded part the buffer holds what this process holds, beside others that as many
    processes hold alike.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.forms = [Form.of(part) for part in parts]
        kinds = [
            (widened_dtype(part), part.device, form.holders)
            for part, form in zip(parts, self.forms)
        ]
        self.kinds = list(dict.fromkeys(kinds))
        self._buffer = [self.kinds.index(kind) for kind in kinds]
        self._sizes = [part.numel() for part in to_local(parts)]
        self.holders = [holders for _, _, holders in self.kinds]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Buffers with copies of ``parts``."""
        here = to_local(parts)
        return [
            torch.cat([here[i].reshape(-1) for i in self._indices(k)]).to(device, dtype)
            for k, (dtype, device, _) in enumerate(self.kinds)
        ]

    def split(self, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts, as views of ``buffers``."""
        found: dict[int, Tensor] = {}
        for k, buffer in enumerate(buffers):
            indices = self._indices(k)
            found |= zip(indices, buffer.split([self._sizes[i] for i in indices]), strict=True)
        return tuple(form.shaped(found[i]) for i, form in enumerate(self.forms))

    def _indices(self, buffer: int) -> list[int]:
        return [i for i, k in enumerate(self._buffer) if k == buffer]


class Vector:
    """A point of the product space of some tensors, in memory of its own.

    All parts of one dtype and device are one flat buffer, so that an operation is one call
    however many the parts are. Half-precision parts are widened to float32, since a solver's
    recurrences lose their meaning at eight bits. Operators give new vectors; methods that end in
    an underscore change this one. Factors are numbers, or scalar tensors that stay on the device.

    Example:
        >>> x = Vector([torch.ones(2, 2), torch.zeros(3)])
        >>> (2 * x).norm()
        4.0
    """

    __slots__ = ("_parts", "_space", "buffers")

    def __init__(self, parts: Iterable[Tensor]) -> None:
        parts = [part.detach() for part in parts]
        self._space = Space(parts)
        self.buffers = self._space.gather(parts)
        self._parts: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, gradient: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
        """``gradient`` with zeros where it is None."""
        return cls(
            torch.zeros_like(tensor) if part is None else part
            for part, tensor in zip(gradient, like, strict=True)
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The vector in the shapes of the tensors: views of its memory."""
        if self._parts is None:
            self._parts = self._space.split(self.buffers)
        return self._parts

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self._space.forms)

    def __add__(self, other: Vector) -> Vector:
        return self._with(map(torch.add, self.buffers, other.buffers))

    def __sub__(self, other: Vector) -> Vector:
        return self._with(map(torch.sub, self.buffers, other.buffers))

    def __mul__(self, factor: float | Tensor | Vector) -> Vector:
        """With a number, or entry by entry with another vector."""
        if isinstance(factor, Vector):
            return self._with(map(torch.mul, self.buffers, factor.buffers))
        return self._with(x * _at(factor, x) for x in self.buffers)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Vector:
        return self._with(x / _at(divisor, x) for x in self.buffers)

    def __neg__(self) -> Vector:
        return self._with(map(torch.neg, self.buffers))

    def copy(self) -> Vector:
        """The same point in other memory."""
        return self._with(map(torch.clone, self.buffers))

    def plus(self, other: Vector, factor: float | Tensor) -> Vector:
        """self + factor·other, in one operation."""
        pairs = zip(self.buffers, other.buffers, strict=True)
        return self._with(_axpy(x, y, factor) for x, y in pairs)

    def add_(self, other: Vector, factor: float | Tensor = 1.0) -> Vector:
        """This vector becomes self + factor·other."""
        for x, y in zip(self.buffers, other.buffers, strict=True):
            _axpy(x, y, factor, out=x)
        return self

    def mul_add_(self, factor: float | Tensor, other: Vector) -> Vector:
        """This vector becomes factor·self + other."""
        for x, y in zip(self.buffers, other.buffers, strict=True):
            _axpy(y, x, factor, out=x)
        return self

    def mul_(self, factor: float | Tensor) -> Vector:
        """This vector becomes factor·self."""
        for x in self.buffers:
            x.mul_(_at(factor, x))
        return self

    def copy_(self, other: Vector) -> Vector:
        """This vector becomes equal to ``other``."""
        for x, y in zip(self.buffers, other.buffers, strict=True):
            x.copy_(y)
        return self

    def norm(self) -> float:
        """The 2-norm, read from the device."""
        return math.sqrt(dot(self, self))

    def numel(self) -> int:
        """The dimension of the space."""
        return sum(form.shape.numel() for form in self._space.forms)

    def flat(self) -> Tensor:
        """All entries in the order of the parts, ``(numel,)``, on the first part's device.

        The buffer itself where there is one that is not sharded.
        """
        if self._space.holders == [0]:
            return self.buffers[0]
        device = self.parts[0].device
        return torch.cat([gather(part).reshape(-1).to(device) for part in self.parts])

    def with_entries(self, flat: Tensor) -> Vector:
        """The vector of this space with the entries of ``flat``, a ``(numel,)`` tensor."""
        chunks = flat.split([form.shape.numel() for form in self._space.forms])
        return Vector(sharded_like(x.reshape(p.shape), p) for x, p in zip(chunks, self.parts))

    def isfinite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return reductions.all_finite(self.parts)

    def _with(self, buffers: Iterable[Tensor]) -> Vector:
        result = object.__new__(Vector)
        result._space, result.buffers, result._parts = self._space, list(buffers), None
        return result


def inner(a: Vector, b: Vector) -> Tensor:
    """⟨a, b⟩ in float64, a scalar on the device; see `reductions.to_floats`."""
    sums = list(map(reductions.dot, a.buffers, b.buffers))
    return reductions.summed(totals(sums, a._space.holders))


def dot(a: Vector, b: Vector) -> float:
    """⟨a, b⟩ in float64, read from the device."""
    return reductions.to_floats([inner(a, b)])[0]


def normalised(vector: Vector) -> Vector:
    """``vector`` with length 1, or zero where it is zero; nothing is read."""
    length = inner(vector, vector).sqrt()
    return vector * torch.where(length > 0, 1 / length, 0.0)


def machine_epsilon(tensors: Iterable[Tensor]) -> float:
    """The relative rounding error of the coarsest of ``tensors``, half precision as float32."""
    return max(float(torch.finfo(widened_dtype(x)).eps) for x in tensors)


def zeros_like(vector: Vector) -> Vector:
    """The zero of the vector's space."""
    return vector._with(map(torch.zeros_like, vector.buffers))


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 where it is in half precision, itself otherwise."""
    return tensor.float() if tensor.dtype in HALF else tensor


def widened_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of `widened`."""
    return torch.float32 if tensor.dtype in HALF else tensor.dtype


def _at(factor: float | Tensor, like: Tensor) -> float | Tensor:
    """``factor`` where an operation on ``like`` can use it without a read."""
    return factor.to(like.device, like.dtype) if isinstance(factor, Tensor) else factor


def _axpy(x: Tensor, y: Tensor, factor: float | Tensor, out: Tensor | None = None) -> Tensor:
    """x + factor·y, by one kernel and without a read."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor.to(y.device, y.dtype), out=out)
    return torch.add(x, y, alpha=factor, out=out)
