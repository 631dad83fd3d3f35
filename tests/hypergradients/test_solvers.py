"""The linear solvers against the optimality conditions that define their iterates."""

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft import Engine, HypergradientWarning, ProblemError, Solver, hypergradient
from hyperopt_peft.hypergradients import (
    MINRES,
    ConjugateGradient,
    Exact,
    Neumann,
    Nystrom,
    Vector,
    registered,
)
from hyperopt_peft.hypergradients.estimate import open_oracle
from hyperopt_peft.hypergradients.implicit import exact
from hyperopt_peft.hypergradients.registry import get_estimator
from tests.support.quadratic import FunctionLevel, Level, flat, positive, program, symmetric
from tests.support.systems import indefinite, residual, system

SOLVERS = {
    name: entry.estimator()
    for name, entry in registered().items()
    if issubclass(entry.estimator, Solver)
}
each_solver = pytest.mark.parametrize("solver", [pytest.param(s, id=n) for n, s in SOLVERS.items()])
krylov_solver = pytest.mark.parametrize("kind", [ConjugateGradient, MINRES])


def krylov(h: Tensor, b: Tensor, steps: int) -> Tensor:
    """An orthonormal basis of span(b, Hb, …, H^(steps−1) b)."""
    basis = [b / b.norm()]
    for _ in range(steps - 1):
        q = h @ basis[-1]
        for _ in range(2):  # once more, for orthogonality to rounding
            q = q - sum((q @ p) * p for p in basis)
        basis.append(q / q.norm())
    return torch.stack(basis, 1)


@given(steps=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_minres_has_the_least_residual_of_its_krylov_space(steps: int, seed: int) -> None:
    h = indefinite(9, seed)
    matvec, vector, b = system(h, seed)
    basis = krylov(h, b, steps)
    best = basis @ torch.linalg.lstsq(h @ basis, b[:, None]).solution[:, 0]
    solution = MINRES(steps=steps, tolerance=0.0).solve(matvec, vector)
    torch.testing.assert_close(flat(solution.v), best, rtol=1e-7, atol=1e-7)


def galerkin(h: Tensor, b: Tensor, steps: int) -> Tensor:
    """The v of span(b, Hb, …) whose residual is orthogonal to that space."""
    basis = krylov(h, b, steps)
    return basis @ torch.linalg.solve(basis.T @ h @ basis, basis.T @ b)


@pytest.mark.parametrize("condition", [10.0, 1000.0])
@given(steps=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_cg_returns_its_last_iterate(condition: float, steps: int, seed: int) -> None:
    """Its error falls at every step (Hestenes & Stiefel 1952, 6:3); its residual need not."""
    eigenvalues = condition ** torch.linspace(0, 1, 9, dtype=torch.float64)
    h = symmetric(eigenvalues, torch.Generator().manual_seed(seed))
    matvec, vector, b = system(h, seed)
    solution = ConjugateGradient(steps=steps, tolerance=0.0).solve(matvec, vector)
    torch.testing.assert_close(flat(solution.v), galerkin(h, b, steps), rtol=1e-6, atol=1e-6)


def test_minres_stops_where_the_hessian_is_singular() -> None:
    """b has a part outside H's range: the least residual is that part, √½ of b."""
    h = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    vector = Vector([torch.ones(2, dtype=torch.float64)])
    solution = MINRES().solve(lambda v: v.with_entries(h @ v.flat()), vector)
    assert "singular" in solution.note
    assert solution.residual == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("seed", range(2))
def test_minres_reports_the_residual_of_its_solution_of_a_singular_system(seed: int) -> None:
    """In float32 150 steps are many more than the 20 of the Krylov space, and rounding piles up."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(25, 25, dtype=torch.float64))[0]
    values = torch.cat([torch.logspace(0, -2.5, 20), torch.zeros(5)]).double()
    h = (basis * values) @ basis.T
    b = Vector([(basis @ torch.cat([torch.ones(20), torch.full((5,), 0.1)]).double()).float()])
    solution = MINRES(steps=150).solve(lambda v: Vector([h.float() @ v.parts[0]]), b)
    left = b.parts[0].double() - h @ solution.v.parts[0].double()
    assert solution.note and left.norm() / b.norm() < 5 * solution.residual


@pytest.mark.parametrize("seed", range(2))
def test_conjugate_gradients_report_what_rounding_leaves_of_their_residual(seed: int) -> None:
    """In float32 at condition 1e6 the recursion's residual falls to 1e-8, and v's own does not."""
    values = torch.cat([torch.logspace(0, -1, 20), torch.logspace(-6, -5.8, 20)]).double()
    h = symmetric(values, torch.Generator().manual_seed(seed)).float()
    b = Vector([torch.randn(40, generator=torch.Generator().manual_seed(seed))])
    solution = ConjugateGradient(steps=400, tolerance=1e-8).solve(
        lambda v: Vector([h @ v.parts[0]]), b
    )
    left = b.parts[0].double() - h.double() @ solution.v.parts[0].double()
    assert left.norm() / b.norm() < 3 * solution.residual


@krylov_solver
def test_the_residual_of_differences_is_that_of_their_solution(kind: Callable[..., Solver]) -> None:
    """A curvature that changes within a difference: the steps do not see it, v's residual does."""
    torch.manual_seed(0)
    w = torch.randn(8, requires_grad=True)
    u = (200 * w + torch.linspace(-2, 2, 8)).detach().requires_grad_()
    upper = FunctionLevel(lambda _: w.sin().sum() + u.sum(), [u])
    lower = FunctionLevel(lambda _: (200 * w - u).cosh().log().sum() / 4000 + w @ w, [w])
    oracle = open_oracle(upper, lower)
    solver = kind(steps=40, tolerance=1e-8, product="difference")
    with oracle.open(), oracle.product("difference") as product:
        of_steps = solver.solve(product.hessian, oracle.upper_gradient.b)
    h = torch.diag(2 + 10 / (200 * w - u).detach().double().cosh().square())
    true = residual(h.float(), of_steps.v, w.detach().cos())
    assert of_steps.residual is not None and true > 10 * of_steps.residual
    assert true < 3 * open_oracle(upper, lower).estimate(solver).residual


@given(seed=st.integers(0, 10**6))
def test_conjugate_gradients_stop_at_negative_curvature_and_say_so(seed: int) -> None:
    """They return the iterate of least residual from before the step that met it."""
    eigenvalues = torch.linspace(1, 10, 9, dtype=torch.float64)
    eigenvalues[0] = -0.3
    h = symmetric(eigenvalues, torch.Generator().manual_seed(seed))
    matvec, vector, b = system(h, seed)
    solution = ConjugateGradient(steps=50).solve(matvec, vector)
    assert "negative curvature" in solution.note and solution.steps is not None
    iterates = [torch.zeros_like(b), *(galerkin(h, b, k + 1) for k in range(solution.steps))]
    best = min(iterates, key=lambda v: float((b - h @ v).norm()))
    torch.testing.assert_close(flat(solution.v), best, rtol=1e-7, atol=1e-7)
    assert solution.residual == pytest.approx(residual(h, solution.v, b), abs=1e-10)


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize("product", ["exact", "difference"])
@pytest.mark.parametrize("method", ["darts", "cg", "minres", "neumann", "unrolled"])
def test_a_lower_loss_of_constant_slope_leaves_the_direct_term(method: str, product: str) -> None:
    """∂f/∂w has no graph here: there is nothing to differentiate once more."""
    quadratic = program(0)
    upper, _ = quadratic.levels()
    lower = Level(lambda w, u: w.sum() + u @ u, quadratic.w, quadratic.w, quadratic.u)
    actual = flat(hypergradient(upper, lower, f"{method}:product={product}"))
    torch.testing.assert_close(actual, quadratic.direct)


@each_solver
@pytest.mark.parametrize("seed", range(2))
def test_the_reported_residual_is_that_of_the_solution(solver: Solver, seed: int) -> None:
    h = positive(15, torch.Generator().manual_seed(seed))
    matvec, vector, b = system(h, seed)
    solution = solver.solve(matvec, vector)
    if solution.residual is not None:
        actual = pytest.approx(residual(h, solution.v, b), rel=1e-6, abs=1e-13)
        assert solution.residual == actual


@pytest.mark.parametrize("solver", [*SOLVERS.values(), Neumann(terms=1)])
@pytest.mark.parametrize(("of_h", "of_b"), [(-250, 250), (250, 250), (0, -250)])
def test_no_system_is_too_large_or_too_small(solver: Solver, of_h: int, of_b: int) -> None:
    """A power of two changes no digit of H or b, so none of v where no size is a fixed number."""
    h = positive(7, torch.Generator().manual_seed(0))
    matvec, vector, _ = system(h)
    expected = solver.solve(matvec, vector)
    actual = solver.solve(lambda v: 2.0**of_h * matvec(v), 2.0**of_b * vector)
    torch.testing.assert_close(
        2.0 ** (of_h - of_b) * actual.v.flat(), expected.v.flat(), rtol=1e-12, atol=1e-12
    )
    assert (actual.steps, actual.note) == (expected.steps, expected.note)


@pytest.mark.parametrize("solver", [ConjugateGradient, MINRES, Exact, Nystrom])
def test_damping_adds_to_the_diagonal(solver: Callable[..., Solver]) -> None:
    h = positive(7, torch.Generator().manual_seed(0))
    matvec, vector, b = system(h)
    actual = flat(solver(damping=3.0).solve(matvec, vector).v)
    expected = torch.linalg.solve(h + 3 * torch.eye(7, dtype=torch.float64), b)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@krylov_solver
def test_krylov_solvers_stop_at_their_tolerance(kind: Callable[..., Solver]) -> None:
    h = positive(40, torch.Generator().manual_seed(0))
    matvec, vector, b = system(h)
    solution = kind(steps=40, tolerance=1e-3).solve(matvec, vector)
    assert solution.steps is not None and 1 < solution.steps < 40
    assert residual(h, solution.v, b) <= 1e-3
    one_less = kind(steps=solution.steps - 1, tolerance=1e-3).solve(matvec, vector)
    assert residual(h, one_less.v, b) > 1e-3


def test_neumann_says_where_its_series_diverges() -> None:
    matvec, vector, _ = system(positive(6, torch.Generator().manual_seed(0)))
    assert "diverges" in Neumann(step_size=1.0).solve(matvec, vector).note


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
def test_a_hessian_that_is_zero_is_an_error_or_a_note() -> None:
    quadratic = program(0)
    upper, _ = quadratic.levels()
    linear = Level(lambda w, u: w @ u, quadratic.w, quadratic.w, quadratic.u)
    with pytest.raises(ProblemError, match=r"exact: .*singular"):
        hypergradient(upper, linear, "exact")
    for solver in (Neumann(), ConjugateGradient(), MINRES(), Nystrom()):
        solution = solver.solve(lambda v: 0.0 * v, Vector([torch.ones(3)]))
        assert solution.v.norm() == 0 and solution.residual == 1 and solution.steps == 0
        assert "zero" in solution.note or "singular" in solution.note
        assert flat(hypergradient(upper, linear, solver)).isfinite().all()


def test_exact_solves_a_singular_system_that_has_a_solution() -> None:
    """v has no part in the null space, and the note tells the rank."""
    h = torch.diag(torch.tensor([2.0, 0.0, 4.0], dtype=torch.float64))
    b = Vector([torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64)])
    solution = Exact().solve(lambda v: v.with_entries(h @ v.flat()), b)
    torch.testing.assert_close(solution.v.flat(), torch.tensor([1, 0, 0.5], dtype=torch.float64))
    assert "rank 2 of 3" in solution.note


def test_exact_refuses_too_many_unknowns(monkeypatch: pytest.MonkeyPatch) -> None:
    upper, lower = program(0).levels()
    monkeypatch.setattr(exact, "LARGEST", 12)
    hypergradient(upper, lower, "exact")
    monkeypatch.setattr(exact, "LARGEST", 11)
    with pytest.raises(ProblemError, match=r"exact: .*12 unknowns.* 11; use .*cg"):
        hypergradient(upper, lower, "exact")


def test_exact_solves_in_double_precision() -> None:
    """A Hilbert matrix has condition number 5e5 at n = 5, of which float32 would keep no digit."""
    n = 5
    hilbert = torch.tensor([[1.0 / (i + j + 1) for j in range(n)] for i in range(n)])
    ones = torch.ones(n, dtype=torch.float64)
    b = Vector([(hilbert.double() @ ones).float()])
    expected = torch.linalg.solve(hilbert.double(), b.parts[0].double())
    v = Exact().solve(lambda v: v.with_entries(hilbert @ v.flat()), b).v.flat().double()
    assert (v - expected).norm() < 1e-6 * expected.norm()


def regression(dtype: torch.dtype, size: int, scale: float) -> tuple[FunctionLevel, FunctionLevel]:
    """Least squares below, in a linear layer; above, the weights' length."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(size, 1, bias=False).to(dtype)
    x, y = torch.randn(20, size).to(dtype), torch.randn(20, 1).to(dtype)
    u = torch.ones((), dtype=dtype, requires_grad=True)
    upper = FunctionLevel(lambda _: scale * (layer.weight * u).square().sum(), [u])
    return upper, FunctionLevel(lambda _: (layer(x) - y * u).square().mean(), [layer.weight])


@each_solver
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-30), (torch.float32, 1.0), (torch.float64, 1e10)]
)
def test_further_steps_change_nothing(solver: Solver, dtype: torch.dtype, scale: float) -> None:
    """Not where the residual is zero, nor where a direction underflows."""
    options = {field.name for field in dataclasses.fields(solver)}
    many = {"steps": 400, "tolerance": 0.0} if "tolerance" in options else {}
    for size in (1, 8):
        levels = regression(dtype, size, scale)
        expected = flat(hypergradient(*levels, "exact"))
        actual = flat(hypergradient(*levels, dataclasses.replace(solver, **many)))
        tolerance = 1e-4 if dtype == torch.float32 else 1e-9
        if many:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
        assert actual.isfinite().all()


@pytest.mark.parametrize("method", ["cg:steps=1", "f2sa:tolerance=0.5"])
def test_hypergradient_warns_of_a_large_residual(method: str) -> None:
    levels = program(0).levels()
    residual = open_oracle(*levels).estimate(get_estimator(method)).residual
    assert residual is not None and residual > 0.1
    with pytest.warns(HypergradientWarning, match=f"{method.split(':')[0]}: .*{residual:.3g}") as w:
        hypergradient(*levels, method)
    assert [warning.filename for warning in w] == [__file__]


@pytest.mark.parametrize("method", ["cg", "f2sa", "darts", "direct"])
def test_a_small_residual_or_none_is_no_warning_nor_any_in_training(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(*program(0).levels(), method)
        (record,) = Engine(*program(0).levels(), "cg:steps=1", progress=False).run(1)
    assert record["residual"] > 0.1
