"""`warm` keeps v between upper steps: its rate, its mean over minibatches, and what is kept."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft import NonFiniteError
from hyperopt_peft.hypergradients import Matvec, Vector, WarmStart
from hyperopt_peft.hypergradients.implicit.warm import FIRST_STEPS
from tests.support.quadratic import normal, positive, symmetric

State = dict[str, Any]


def of(matrix: Tensor) -> Matvec:
    return lambda v: Vector([matrix @ v.parts[0]])


def calls(solver: WarmStart, systems: Sequence[tuple[Tensor, Tensor]], state: State) -> list[Any]:
    """Solutions of one upper step after the other, and the last state."""
    solutions = []
    for h, b in systems:
        solution, state = solver.advance(of(h), Vector([b]), state)
        solutions.append(solution)
    return [*solutions, state]


@given(
    n=st.integers(1, 6),
    steps=st.integers(1, 3),
    decay=st.sampled_from([0.0, 0.5, 1.0]),
    damping=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_errors_of_all_steps(n: int, steps: int, decay: float, damping: float, seed: int) -> None:
    """v* − v = Π (I − (a/k^decay)(H + damping·I)) v*, the first steps being Neumann's."""
    h, b, a = positive(n, torch.Generator().manual_seed(seed)), normal(n, seed=seed), 0.05
    one = torch.eye(n, dtype=torch.float64)
    damped = h + damping * one
    solution = torch.linalg.solve(damped, b)
    error = torch.linalg.matrix_power(one - a * damped, FIRST_STEPS + 1) @ solution
    solver = WarmStart(steps, a, decay, damping)
    *actual, state = calls(solver, [(h, b)] * 6, {})
    for k, each in enumerate(actual, start=1):
        expected = solution - error
        torch.testing.assert_close(each.v.parts[0], expected, rtol=1e-11, atol=1e-11)
        residual = float((b - damped @ expected).norm() / b.norm())
        assert each.residual == pytest.approx(residual, rel=1e-9, abs=1e-14)
        assert each.steps == (FIRST_STEPS + steps if k == 1 else steps)
        contraction = one - a / k**decay * damped
        error = torch.linalg.matrix_power(contraction, steps) @ error
    torch.testing.assert_close(state["v"].parts[0], solution - error, rtol=1e-11, atol=1e-11)


@given(damping=st.sampled_from([0.0, 1.0]), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 10**6))
def test_the_step_follows_the_largest_eigenvalue(damping: float, scale: float, seed: int) -> None:
    """Found by one product a call, and the solution at its rate: (1 − 1/10)^200 = 7e-10."""
    h, b = scale * positive(8, torch.Generator().manual_seed(seed)), normal(8, seed=seed)
    damping = damping * scale
    *actual, state = calls(WarmStart(decay=0.0, damping=damping), [(h, b)] * 200, {})
    assert 8 * scale < state["largest"] < 10.001 * scale  # a draw may hardly have that eigenvector
    expected = torch.linalg.solve(h + damping * torch.eye(8, dtype=torch.float64), b)
    torch.testing.assert_close(scale * actual[-1].v.parts[0], scale * expected, rtol=0, atol=1e-7)


def test_its_mean_over_all_sequences_of_batches_is_that_of_the_mean_batch() -> None:
    """A solver that starts anew on each batch has the mean of H⁻¹b, which is another."""
    batches = [(positive(4, torch.Generator().manual_seed(k)), normal(4, seed=k)) for k in range(3)]
    mean = sum(h for h, _ in batches) / 3, sum(b for _, b in batches) / 3
    solver, start = WarmStart(step_size=0.08), {"v": Vector([normal(4, seed=9)]), "k": 0}
    *expected, _ = calls(solver, [mean] * 5, start)
    ends = [calls(solver, sequence, start)[-2].v.flat() for sequence in product(batches, repeat=5)]
    actual = torch.stack(ends).mean(0)
    torch.testing.assert_close(actual, expected[-1].v.flat(), rtol=1e-12, atol=1e-12)
    anew = torch.stack([torch.linalg.solve(*batch) for batch in batches]).mean(0)
    assert (anew - torch.linalg.solve(*mean)).norm() > 0.1 * anew.norm()


@pytest.mark.parametrize("factor", [1.0, 50.0])
def test_curvature_that_appears_later_is_found(factor: float) -> None:
    """H and b are first zero in one variable, which power iteration from b would never meet."""
    h, b = torch.diag(torch.tensor([1.0, 0.5, 0.0])).double(), torch.ones(3, dtype=torch.float64)
    b[2] = 0
    *_, state = calls(WarmStart(), [(h, b)] * 5, {})
    h[2, 2], b[2] = factor, 1.0
    *actual, _ = calls(WarmStart(decay=0.0), [(h, b)] * 300, state)
    torch.testing.assert_close(actual[-1].v.flat(), torch.linalg.solve(h, b), rtol=1e-4, atol=1e-4)
    assert max(each.v.norm() for each in actual) < 30


def test_curvature_that_has_gone_is_forgotten() -> None:
    """Or the step would stay as short as at the steepest point of the run."""
    h, b = positive(4, torch.Generator().manual_seed(0)), normal(4)
    *_, state = calls(WarmStart(), [(h, b)] * 20, {})
    *_, later = calls(WarmStart(), [(h / 100, b)] * 200, state)
    assert later["largest"] == pytest.approx(state["largest"] / 100, rel=0.02)


def test_negative_curvature_starts_again_and_damping_prevents_it() -> None:
    """Otherwise v would grow for ever along it: here as 1.1^400."""
    eigenvalues = torch.tensor([-0.5, 1.0, 3.0, 5.0], dtype=torch.float64)
    h, b = symmetric(eigenvalues, torch.Generator().manual_seed(0)), normal(4)
    *actual, _ = calls(WarmStart(decay=0.0), [(h, b)] * 400, {})
    notes = [each.note for each in actual]
    assert "negative curvature along v, which is reset" in notes and "" in notes
    # Of v with vᵀHv ≥ 0, the negative direction has at most √10 times as much as the others.
    assert max(each.v.norm() for each in actual) < 5 * b.norm()
    *actual, _ = calls(WarmStart(decay=0.0, damping=1.0), [(h, b)] * 400, {})
    assert not any(each.note for each in actual)
    expected = torch.linalg.solve(h + torch.eye(4, dtype=torch.float64), b)
    torch.testing.assert_close(actual[-1].v.flat(), expected, rtol=1e-7, atol=1e-7)


def test_a_hessian_that_is_zero_keeps_the_state() -> None:
    zero, b = torch.zeros(3, 3, dtype=torch.float64), Vector([normal(3)])
    solution, state = WarmStart().advance(of(zero), b, {})
    assert "zero along" in solution.note and solution.v.norm() == 0 and not state
    damped, state = WarmStart(damping=2.0).advance(of(zero), b, {})
    torch.testing.assert_close(damped.v.flat(), b.flat() / 2)
    # The power iteration goes on from there: curvature that comes is found.
    h = positive(3, torch.Generator().manual_seed(0))
    *_, state = calls(WarmStart(damping=2.0), [(h, b.flat())] * 50, state)
    assert state["largest"] == pytest.approx(10, rel=0.02)


def test_a_divergence_is_an_error_before_it_is_kept() -> None:
    h, b = positive(4, torch.Generator().manual_seed(0)), normal(4)
    with pytest.raises(NonFiniteError, match="step_size "):
        WarmStart(step_size=1e30, steps=20).advance(of(h), Vector([b]), {})
