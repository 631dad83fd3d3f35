"""Vectors over several tensors: their arithmetic is that of the flat vector."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperopt_peft.hypergradients import Vector, dot, zeros_like
from hyperopt_peft.utils.restore import TensorPool
from hyperopt_peft.utils.vector import inner

SHAPES = ((2, 3), (), (4,))
EPS = torch.finfo(torch.float64).eps


def vector(seed: int, dtype: torch.dtype = torch.float64) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    return Vector(torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES)


@given(seed=st.integers(0, 1000), factor=st.floats(-10, 10))
def test_arithmetic_is_that_of_the_flat_vector(seed: int, factor: float) -> None:
    a, b = vector(seed), vector(seed + 1)
    x, y = a.flat(), b.flat()
    assert x.shape == (a.numel(),) == (11,) and len(a) == 3
    pairs = [(a + b, x + y), (a - b, x - y), (factor * a, factor * x), (a * factor, factor * x)]
    pairs += [(a / 3, x / 3), (-a, -x), (zeros_like(a), 0 * x)]
    for found, expected in pairs:
        assert torch.equal(found.flat(), expected)
        assert [part.shape for part in found] == [part.shape for part in a]
    assert dot(a, b) == pytest.approx(float(x @ y), abs=1e-12)
    assert a.norm() == pytest.approx(float(x.norm()))
    assert torch.equal(a.with_entries(y).flat(), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parts_are_widened(dtype: torch.dtype) -> None:
    a = vector(0, dtype)
    assert {part.dtype for part in a} == {torch.float32}
    assert torch.equal(a.flat().to(dtype).float(), a.flat())


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_norms_are_those_of_double_precision(scale: float) -> None:
    """The squares of the first and the last leave the range of float32."""
    parts = [scale * torch.randn(70_000), scale * torch.randn(3, 5)]
    expected = torch.cat([part.double().flatten() for part in parts]).norm()
    assert Vector(parts).norm() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_a_factor_is_a_number_or_a_scalar_on_the_device(factor: float | torch.Tensor) -> None:
    a, b = vector(0, torch.float32), vector(1, torch.float32)
    x, y = a.flat().clone(), b.flat().clone()
    pairs = [(a.plus(b, factor), x + y / 2), (a.copy().add_(b, factor), x + y / 2)]
    pairs += [(a.copy().mul_add_(factor, b), x / 2 + y), (a.copy().mul_(factor), x / 2)]
    pairs += [(a * factor, x / 2), (a / factor, 2 * x)]
    for found, expected in pairs:
        torch.testing.assert_close(found.flat(), expected)


def test_many_leaves_are_one_buffer() -> None:
    """Of each dtype; the parts are views, and a vector has memory of its own."""
    leaves = [torch.full((2,), float(k)) for k in range(5)] + [torch.ones(3, dtype=torch.float64)]
    a = Vector(leaves)
    assert [len(buffer) for buffer in a.buffers] == [10, 3]
    a.add_(a.copy())
    assert torch.equal(a.parts[4], 2 * leaves[4]) and torch.equal(a.parts[5], 2 * leaves[5])
    assert float(leaves[4][0]) == 4.0
    assert float(inner(a, a.copy())) == dot(a, a.copy()) == 4 * (2 * (1 + 4 + 9 + 16) + 3)
    assert dot(a, a) == pytest.approx(dot(a, a.copy()), rel=4 * EPS)


def test_none_stands_for_zeros_and_graphs_are_left_behind() -> None:
    w = torch.ones(2, 2, requires_grad=True)
    a = Vector.of([None, 2 * w], [torch.ones(3), w])
    assert torch.equal(a.flat(), torch.tensor([0.0, 0, 0, 2, 2, 2, 2]))
    assert not a.flat().requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_seen(value: float) -> None:
    assert vector(0).isfinite() and Vector([torch.full((100,), 1e38)]).isfinite()
    assert not Vector([torch.ones(2), torch.tensor(value)]).isfinite()


def test_copies_fit_what_they_copy() -> None:
    copies, w = TensorPool(), (torch.ones(2), torch.ones(3))
    first = copies.take(w)
    memory = [x.data_ptr() for x in first]
    copies.give_back(first)
    again = copies.take([2 * x for x in w])
    assert [x.data_ptr() for x in again] == memory and torch.equal(again[0], 2 * w[0])
    copies.give_back(again)
    wide = copies.take([x.double() / 3 for x in w])
    assert torch.equal(wide[0], w[0].double() / 3)
