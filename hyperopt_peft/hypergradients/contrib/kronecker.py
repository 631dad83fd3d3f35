"""The empirical Fisher matrix of linear layers in Kronecker eigenbases, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients.contrib.linear_calls import Layer
from hyperopt_peft.utils import distributed, reductions
from hyperopt_peft.utils.vector import Vector

RELATIVE_DAMPING = 1.0  # times a layer's mean eigenvalue; 0.1 (arXiv:2308.03296) slows CG down
MAX_SIDE = 2048  # the largest dimension with an eigenbasis, whose cost is cubic
CHUNK = 16  # the number of rows whose weight gradients are formed at once

#: For each layer a pair for each batch: the inputs ``(rows, tokens, in)``, and the gradients
#: ∂f_i/∂y of the outputs, ``(rows, tokens, out)``, where f_i is the loss of row i.
Samples = Mapping[Layer, Sequence[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Block:
    """A layer's matrix Σ_jk λ_jk (q_j ⊗ p_k)(q_j ⊗ p_k)ᵀ.

    ``values`` is λ, ``(out, in)``; the columns of ``left`` ``(out, out)`` and ``right``
    ``(in, in)`` are q and p, and None is the identity.
    """

    layer: Layer
    left: Tensor | None
    right: Tensor | None
    values: Tensor

    def inverse(self, matrix: Tensor, shift: Tensor) -> Tensor:
        """(block + shift·I)⁻¹ applied to ``matrix``, ``(out, in)``."""
        inside = _times(_times(matrix, self.right).mT, self.left).mT / (self.values + shift)
        right = None if self.right is None else self.right.mT
        left = None if self.left is None else self.left.mT
        return _times(_times(inside, right).mT, left).mT


class Fisher:
    """A block for each layer, and λ̄·I for other variables, λ̄ the mean of all eigenvalues.

    A block without a gradient is λ̄·I too. ``damping`` is added to the diagonal; None adds each
    block's mean eigenvalue.
    """

    def __init__(self, blocks: Sequence[Block], damping: float | None) -> None:
        total = reductions.total([block.values.double().sum() for block in blocks])
        mean = total / sum(block.values.numel() for block in blocks)
        mean = torch.where(mean > 0, mean, 1.0)
        self._blocks, self._damping = blocks, damping
        self._rest = mean + self._shift(mean)
        self._means = [block.values.double().mean() for block in blocks]
        self._shifts = [torch.where(x > 0, self._shift(x), self._rest.to(x)) for x in self._means]

    def _shift(self, mean: Tensor) -> Tensor:
        return RELATIVE_DAMPING * mean if self._damping is None else mean * 0 + self._damping

    def inverse(self, r: Vector) -> Vector:
        """(F + damping·I)⁻¹ r."""
        result = r / self._rest
        for block, shift in zip(self._blocks, self._shifts, strict=True):
            matrix = block.layer.matrix(r.parts)
            block.layer.assign_(result.parts, block.inverse(matrix, shift.to(matrix)))
        return result


def empirical_fisher(samples: Samples, like: Sequence[Tensor]) -> list[Block]:
    """The blocks of the layers in ``samples``, over variables shaped ``like``.

    With δ = ∂f_i/∂y and inputs x, the bases are the eigenvectors of mean xxᵀ (right) and of the
    mean over rows of Σ_t δδᵀ (left); a dimension above ``MAX_SIDE`` uses the identity. The
    eigenvalues are the second moments of the rows' gradients Σ_t δxᵀ in these bases. A variable
    belongs to one layer only, preferably a ``torch.nn.functional.linear``. Means include all
    processes.
    """
    layers = _disjoint(distributed.union(samples))
    forms = [layer.matrix(like) for layer in layers]
    empty = [
        matrix.new_zeros((size, size) if size <= MAX_SIDE else (size,))
        for matrix in forms
        for size in matrix.shape
    ]
    covariances: list[Tensor | None] = []
    for layer, left, right in zip(layers, empty[::2], empty[1::2], strict=True):
        pair = _covariances(samples[layer], left, right) if layer in samples else (None, None)
        covariances += pair
    factors = [factor for factor in distributed.mean(covariances, empty) if factor is not None]
    if factors and not reductions.all_finite(factors):
        raise NonFiniteError(
            "the inputs or output gradients of a linear layer are not finite; lower the learning "
            "rate, or look for an overflow in the lower loss"
        )
    bases = [torch.linalg.eigh(x)[1] if x.dim() == 2 else None for x in factors]
    pairs = list(zip(bases[::2], bases[1::2], strict=True))
    moments = [
        _second_moments(samples[layer], left, right) if layer in samples else None
        for layer, (left, right) in zip(layers, pairs, strict=True)
    ]
    return [
        Block(layer, left, right, values)
        for layer, (left, right), values in zip(
            layers, pairs, distributed.mean(moments, forms), strict=True
        )
        if values is not None
    ]


def _disjoint(layers: Sequence[Layer]) -> list[Layer]:
    """``layers`` without any that shares a variable with an earlier one; products come last."""
    covered: set[int] = set()
    result = []
    for layer in sorted(layers, key=lambda layer: layer.transposed):
        variables = {x for x in (layer.weight, layer.bias) if x is not None}
        if not covered & variables:
            covered |= variables
            result.append(layer)
    return result


def _covariances(
    samples: Sequence[tuple[Tensor, Tensor]], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean over rows of Σ_t δδᵀ, shaped like ``left``, and mean xxᵀ, shaped like ``right``."""
    rows = sum(len(x) for x, _ in samples)
    tokens = sum(x.shape[0] * x.shape[1] for x, _ in samples)
    for x, delta in samples:
        left = left + _covariance(delta.flatten(0, 1).to(left), left.dim()) / rows
        right = right + _covariance(x.flatten(0, 1).to(right), right.dim()) / tokens
    return left, right


def _covariance(x: Tensor, dim: int) -> Tensor:
    return x.mT @ x if dim == 2 else x.square().sum(0)


def _second_moments(
    samples: Sequence[tuple[Tensor, Tensor]], left: Tensor | None, right: Tensor | None
) -> Tensor:
    """The mean over rows of (leftᵀ (Σ_t δxᵀ) right)², ``(out, in)``."""
    rows, total = sum(len(x) for x, _ in samples), samples[0][0].new_zeros(())
    for x, delta in samples:
        x, delta = _times(x, right), _times(delta, left)
        if x.shape[1] == 1:  # the square of one product is the product of squares
            total = total + delta[:, 0].square().mT @ x[:, 0].square()
            continue
        for some_x, some_delta in zip(x.split(CHUNK), delta.split(CHUNK), strict=True):
            total = total + (some_delta.mT @ some_x).square().sum(0)
    return total / rows


def _times(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else x @ basis.to(x)
