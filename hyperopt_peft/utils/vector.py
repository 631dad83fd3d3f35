"""Vectors of several tensors, with the arithmetic of a linear solver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hyperopt_peft.utils import reductions
from hyperopt_peft.utils.autograd import HALF
from hyperopt_peft.utils.distributed import ShardLayout, gather, sharded_like, to_local, totals


class Space:
    """The layout of a vector: one flat buffer for each dtype, device and `ShardLayout.ranks`.

    A buffer holds only the local shards of sharded parts.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.layouts = [ShardLayout.of(part) for part in parts]
        kinds = [
            (widened_dtype(part), part.device, layout.ranks)
            for part, layout in zip(parts, self.layouts)
        ]
        self.kinds = list(dict.fromkeys(kinds))
        self._buffer = [self.kinds.index(kind) for kind in kinds]
        self._sizes = [part.numel() for part in to_local(parts)]
        self.ranks = [ranks for _, _, ranks in self.kinds]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """New buffers with the entries of ``parts``."""
        here = to_local(parts)
        return [
            torch.cat([here[i].reshape(-1) for i in self._indices(k)]).to(device, dtype)
            for k, (dtype, device, _) in enumerate(self.kinds)
        ]

    def split(self, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The parts, as views of ``buffers``."""
        parts: dict[int, Tensor] = {}
        for k, buffer in enumerate(buffers):
            indices = self._indices(k)
            parts |= zip(indices, buffer.split([self._sizes[i] for i in indices]), strict=True)
        return tuple(layout.shaped(parts[i]) for i, layout in enumerate(self.layouts))

    def _indices(self, buffer: int) -> list[int]:
        return [i for i, k in enumerate(self._buffer) if k == buffer]


class Vector:
    """A vector with a copy of the entries of the tensors ``parts``, in their shapes.

    Parts of one dtype and device share one flat buffer, so that an operation is one kernel for any
    number of parts. Half-precision parts become float32. Operators return new vectors; methods
    that end in an underscore change this vector. A factor is a number or a scalar tensor, which is
    not read from the device.

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
        """The vector with the entries of ``gradient``; None becomes zeros shaped as in ``like``."""
        return cls(
            torch.zeros_like(tensor) if part is None else part
            for part, tensor in zip(gradient, like, strict=True)
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The parts in their own shapes, as views of the buffers."""
        if self._parts is None:
            self._parts = self._space.split(self.buffers)
        return self._parts

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self._space.layouts)

    def __add__(self, other: Vector) -> Vector:
        return self._with(map(torch.add, self.buffers, other.buffers))

    def __sub__(self, other: Vector) -> Vector:
        return self._with(map(torch.sub, self.buffers, other.buffers))

    def __mul__(self, factor: float | Tensor | Vector) -> Vector:
        """factor·self; entry by entry if ``factor`` is a vector."""
        if isinstance(factor, Vector):
            return self._with(map(torch.mul, self.buffers, factor.buffers))
        return self._with(x * _at(factor, x) for x in self.buffers)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Vector:
        return self._with(x / _at(divisor, x) for x in self.buffers)

    def __neg__(self) -> Vector:
        return self._with(map(torch.neg, self.buffers))

    def copy(self) -> Vector:
        """A copy."""
        return self._with(map(torch.clone, self.buffers))

    def plus(self, other: Vector, factor: float | Tensor, *, out: Vector | None = None) -> Vector:
        """self + factor·other, by one kernel for each buffer, in the memory of ``out`` or new."""
        memory = [None] * len(self.buffers) if out is None else out.buffers
        pairs = zip(self.buffers, other.buffers, memory, strict=True)
        buffers = [_axpy(x, y, factor, out=z) for x, y, z in pairs]
        return self._with(buffers) if out is None else out

    def add_(self, other: Vector, factor: float | Tensor = 1.0) -> Vector:
        """self ← self + factor·other."""
        return self.plus(other, factor, out=self)

    def mul_add_(self, factor: float | Tensor, other: Vector) -> Vector:
        """self ← factor·self + other."""
        for x, y in zip(self.buffers, other.buffers, strict=True):
            _axpy(y, x, factor, out=x)
        return self

    def mul_(self, factor: float | Tensor) -> Vector:
        """self ← factor·self."""
        for x in self.buffers:
            x.mul_(_at(factor, x))
        return self

    def norm(self) -> float:
        """The 2-norm; one read from the device."""
        return math.sqrt(dot(self, self))

    def numel(self) -> int:
        """The number of entries."""
        return sum(layout.shape.numel() for layout in self._space.layouts)

    def flat(self) -> Tensor:
        """All entries in the order of the parts, ``(numel,)``, on the first part's device.

        The result is the buffer itself if the vector has a single buffer that is not sharded.
        """
        if self._space.ranks == [0]:
            return self.buffers[0]
        device = self.parts[0].device
        return torch.cat([gather(part).reshape(-1).to(device) for part in self.parts])

    def with_entries(self, flat: Tensor) -> Vector:
        """A vector shaped like this one with the entries ``flat``, ``(numel,)``; inverts `flat`."""
        chunks = flat.split([layout.shape.numel() for layout in self._space.layouts])
        return Vector(sharded_like(x.reshape(p.shape), p) for x, p in zip(chunks, self.parts))

    def isfinite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return reductions.all_finite(self.parts)

    def _with(self, buffers: Iterable[Tensor]) -> Vector:
        result = object.__new__(Vector)
        result._space, result.buffers, result._parts = self._space, list(buffers), None
        return result


def inner(a: Vector, b: Vector) -> Tensor:
    """⟨a, b⟩, a scalar tensor in float64 on the device; see `reductions.dot_product`.

    Example:
        >>> inner(Vector([torch.tensor([1.0, 2.0])]), Vector([torch.tensor([3.0, 4.0])]))
        tensor(11., dtype=torch.float64)
    """
    sums = list(map(reductions.dot_product, a.buffers, b.buffers))
    return reductions.total(totals(sums, a._space.ranks))


def dot(a: Vector, b: Vector) -> float:
    """⟨a, b⟩; one read from the device.

    Example:
        >>> dot(Vector([torch.tensor([1.0, 2.0])]), Vector([torch.tensor([3.0, 4.0])]))
        11.0
    """
    return reductions.to_floats([inner(a, b)])[0]


def normalised(vector: Vector) -> Vector:
    """vector/‖vector‖, or zero for a zero vector; no read from the device."""
    length = inner(vector, vector).sqrt()
    return vector * torch.where(length > 0, 1 / length, 0.0)


def machine_epsilon(tensors: Iterable[Tensor]) -> float:
    """The largest machine epsilon of ``tensors``; half precision counts as float32."""
    return max(float(torch.finfo(widened_dtype(x)).eps) for x in tensors)


def zeros_like(vector: Vector) -> Vector:
    """The zero vector with the shapes of ``vector``.

    Example:
        >>> zeros_like(Vector([torch.ones(2)])).parts
        (tensor([0., 0.]),)
    """
    return vector._with(map(torch.zeros_like, vector.buffers))


def widened(tensor: Tensor) -> Tensor:
    """``tensor``, in float32 if it is in half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor


def widened_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of `widened`."""
    return torch.float32 if tensor.dtype in HALF else tensor.dtype


def _at(factor: float | Tensor, like: Tensor) -> float | Tensor:
    """``factor`` on the device and in the dtype of ``like``."""
    return factor.to(like.device, like.dtype) if isinstance(factor, Tensor) else factor


def _axpy(x: Tensor, y: Tensor, factor: float | Tensor, out: Tensor | None = None) -> Tensor:
    """x + factor·y, by one kernel and without a read from the device."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor.to(y.device, y.dtype), out=out)
    return torch.add(x, y, alpha=factor, out=out)
