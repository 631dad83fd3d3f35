"""Sums over many entries are those of float64, on any processor."""

import pytest
import torch
from torch import Tensor

from hyperopt_peft.utils.reductions import dot_product, squares


def entries(kind: str, size: int, seed: int = 0) -> Tensor:
    if kind == "constant":
        return torch.full((size,), 1.1)
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(size, generator=generator)
    normal = torch.randn(size, generator=generator)
    return 1.1 * normal.sign() if kind == "signs" else normal


@pytest.mark.parametrize("size", [70_000, 3_000_000])
@pytest.mark.parametrize("kind", ["constant", "signs", "normal", "uniform"])
def test_sums_are_those_of_float64(kind: str, size: int) -> None:
    x, y = entries(kind, size), entries(kind, size, seed=1)
    wide, other = x.double(), y.double()
    square, product = wide * wide, wide * other  # sum() adds pairwise, and dot() as the BLAS does
    assert float(squares([x])[0]) == pytest.approx(float(square.sum()), rel=1e-12)
    assert float(dot_product(x, x.clone())) == pytest.approx(float(square.sum()), rel=1e-12)
    bound = 1e-12 * float(product.abs().sum())
    assert float(dot_product(x, y)) == pytest.approx(float(product.sum()), abs=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_layout(dtype: torch.dtype) -> None:
    """The second tensor is not contiguous; each has its own sum."""
    x = entries("normal", 90_000).to(dtype)
    tensors = [x, x.reshape(300, 300).T, x[:3], x[:0], torch.tensor(2.0, dtype=dtype)]
    expected = [float(t.double().square().sum()) for t in tensors]
    assert [float(t) for t in squares(tensors)] == pytest.approx(expected, rel=1e-12)
    found = float(dot_product(x.reshape(300, 300), tensors[1]))
    exact = float((x.double().reshape(300, 300) * tensors[1].double()).sum())
    assert found == pytest.approx(exact, abs=1e-6 * expected[0])
