"""The random low-rank approximation, alone and as a preconditioner, against dense algebra."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft.hypergradients import Nystrom, Vector
from hyperopt_peft.hypergradients.implicit import nystrom
from tests.support.quadratic import flat, positive, symmetric
from tests.support.systems import indefinite, residual, system

EYE = torch.eye(9, dtype=torch.float64)


def columns(like: Vector, rank: int) -> Tensor:
    """Ω as a matrix."""
    return torch.stack([c.flat() for c in nystrom._columns(like, rank)], 1)


def sketch(h: Tensor, omega: Tensor) -> Tensor:
    """(HΩ)(ΩᵀHΩ)⁻¹(HΩ)ᵀ."""
    y = h @ omega
    return y @ torch.linalg.solve(omega.T @ y, y.T)


def solved(h: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """v, b and the solution."""
    matvec, vector, b = system(h)
    solution = Nystrom(**options).solve(matvec, vector)
    return flat(solution.v), b, solution


@given(rank=st.integers(1, 9), seed=st.integers(0, 10**6), damping=st.floats(0.01, 10))
def test_alone_it_solves_with_the_low_rank_hessian(rank: int, seed: int, damping: float) -> None:
    h = positive(9, torch.Generator().manual_seed(seed))
    v, b, solution = solved(h, rank=rank, steps=0, damping=damping)
    low_rank = sketch(h, columns(system(h)[1], rank))
    expected = torch.linalg.solve(low_rank + damping * EYE, b)
    torch.testing.assert_close(v, expected, rtol=1e-8, atol=1e-8)
    assert solution.residual is None and solution.steps == 0


@given(seed=st.integers(0, 10**6), damping=st.sampled_from([None, 0.0, 2.0]))
def test_with_as_many_columns_as_unknowns_it_is_exact(seed: int, damping: float | None) -> None:
    h = positive(9, torch.Generator().manual_seed(seed))
    for rank in (9, 50):
        for steps in (0, 1):
            v, b, _ = solved(h, rank=rank, steps=steps, damping=damping, tolerance=0.0)
            expected = torch.linalg.solve(h + (damping or 0) * EYE, b)
            torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("damping", [None, 0.5])
def test_it_is_preconditioned_conjugate_gradients(steps: int, damping: float | None) -> None:
    """The iterate whose residual is orthogonal to span(P⁻¹b, P⁻¹HP⁻¹b, …)."""
    h, rank = symmetric(torch.arange(1.0, 10).double() ** 2, torch.Generator().manual_seed(0)), 4
    mu = damping or 0.0
    v, b, solution = solved(h, rank=rank, steps=steps, damping=damping, tolerance=0.0)
    values, vectors = torch.linalg.eigh(sketch(h, columns(system(h)[1], rank)))
    u, values = vectors[:, -rank:], values[-rank:]
    inverse = (u / (values + mu)) @ u.T + (EYE - u @ u.T) / (values[0] + mu)
    basis = [inverse @ b]
    for _ in range(steps - 1):
        basis.append(inverse @ (h + mu * EYE) @ basis[-1])
    space = torch.linalg.qr(torch.stack(basis, 1))[0]
    damped = h + mu * EYE
    best = space @ torch.linalg.solve(space.T @ damped @ space, space.T @ b)
    torch.testing.assert_close(v, best, rtol=1e-8, atol=1e-8)
    assert solution.residual == pytest.approx(residual(damped, v, b), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
@given(seed=st.integers(0, 10**6))
def test_negative_curvature_is_left_out_or_ends_it(rank: int, seed: int) -> None:
    """The preconditioner is positive definite, and what CG returns is no worse than zero."""
    h = indefinite(9, seed)
    v, b, solution = solved(h, rank=rank, steps=30)
    assert v.isfinite().all() and residual(h, v, b) <= 1 + 1e-12
    assert "negative curvature" in solution.note
    v, b, solution = solved(h, rank=9, steps=0)
    assert v.isfinite().all() and "negative curvature" in solution.note


@pytest.mark.parametrize("steps", [0, 5])
def test_a_hessian_that_is_zero_leaves_the_damping(steps: int) -> None:
    solution = Nystrom(steps=steps).solve(lambda v: 0.0 * v, Vector([torch.ones(3)]))
    assert solution.v.norm() == 0 and "zero" in solution.note
    damped = Nystrom(steps=steps, damping=4.0).solve(lambda v: 0.0 * v, Vector([torch.ones(3)]))
    torch.testing.assert_close(damped.v.flat(), torch.full((3,), 0.25))


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_of_a_difference_is_no_curvature(seed: int) -> None:
    """Or the v of a Hessian of low rank would be as long as the noise is small."""
    generator = torch.Generator().manual_seed(seed)
    h = symmetric(torch.tensor([3.0, 1.0, *[0.0] * 7]).double(), generator)
    noise = torch.randn(9, 9, dtype=torch.float64, generator=generator)
    v, _, solution = solved(h + 1e-10 * (noise + noise.T), rank=6, steps=0)
    torch.testing.assert_close(v, solved(h, rank=2, steps=0)[0], rtol=0, atol=1e-7)
    assert not solution.note
