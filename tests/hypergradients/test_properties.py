"""What every registered estimator is held to, on quadratic programs with a closed form."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft import hypergradient
from hyperopt_peft.hypergradients import open_oracle
from tests.support.cases import Case, cases
from tests.support.quadratic import FunctionLevel, Level, Program, flat, leaves, program, programs


def estimate(case: Case, program: Program, **options: float) -> Tensor:
    return flat(hypergradient(*program.levels(**options), case.estimator))


def assert_close(actual: Tensor, expected: Tensor, scale: Tensor, tolerance: float) -> None:
    """The distance is at most ``tolerance`` of the size of ``scale``."""
    error = float((actual - expected).norm() / scale.norm())
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@cases("implicit", "penalty")
@given(program=programs())
def test_implicit_and_penalty_estimators_are_accurate(case: Case, program: Program) -> None:
    exact = program.exact_implicit
    tolerance = max(case.tolerance, case.rounding)
    assert_close(estimate(case, program), program.direct + exact, exact, tolerance)


@cases("identity")
@given(program=programs(), scale=st.floats(1e-3, 1e3))
def test_identity_estimators_scale_with_f(case: Case, program: Program, scale: float) -> None:
    """A number takes the place of the inverse Hessian."""
    implicit = scale * program.implicit(getattr(case.estimator, "xi", 1.0) * program.b)
    actual = estimate(case, program, scale=scale) - program.direct
    assert_close(actual, implicit, implicit, 10 * case.rounding)


@cases("unrolled")
@given(program=programs(), steps=st.integers(1, 6), lr=st.floats(0.01, 0.15))
def test_unrolled_sums_the_series(case: Case, program: Program, steps: int, lr: float) -> None:
    """dw_K/du = −lr Σ_{k<K} (I − lr·H)^k C."""
    if hasattr(case.estimator, "steps"):
        estimator = dataclasses.replace(case.estimator, steps=steps)
    else:  # of one step
        estimator, steps = case.estimator, 1
    term, v = program.b, torch.zeros_like(program.b)
    for _ in range(steps):
        v = v + lr * term
        term = term - lr * program.h @ term
    implicit = program.implicit(v)
    actual = flat(hypergradient(*program.levels(lr=lr), estimator))
    assert_close(actual, program.direct + implicit, implicit, case.rounding)


@cases("direct")
@given(program=programs())
def test_direct_estimators_return_the_partial_derivative(case: Case, program: Program) -> None:
    assert_close(estimate(case, program), program.direct, program.direct, case.rounding)


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@cases("implicit")
@given(program=programs(), scale=st.floats(1e-3, 1e3))
def test_implicit_estimators_have_no_scale(case: Case, program: Program, scale: float) -> None:
    plain, scaled = estimate(case, program), estimate(case, program, scale=scale)
    assert_close(scaled, plain, program.exact_implicit, 10 * case.rounding)


@cases()
def test_many_leaves_equal_one_flat_vector(case: Case) -> None:
    """A solver that treats each leaf on its own keeps the diagonal blocks of H only."""
    many = program(0)
    w, u = (leaves(x, [x.shape]) for x in (flat(many.w).detach(), flat(many.u).detach()))
    expected = estimate(case, dataclasses.replace(many, w=w, u=u))
    assert_close(estimate(case, many), expected, expected, 10 * case.rounding)


@cases()
@pytest.mark.parametrize("shape", [(), (2, 1, 3)])
def test_shapes_and_dtypes_are_those_of_the_variables(case: Case, shape: tuple[int, ...]) -> None:
    w = torch.ones(shape, requires_grad=True)
    scalar = torch.ones((), dtype=torch.float64, requires_grad=True)
    u = [torch.ones(shape, requires_grad=True), scalar]

    def f(w: Tensor, u: Tensor) -> Tensor:
        return (w - u[: len(w)]).square().sum() + w.sum() * u[-1]

    def upper_f(w: Tensor, u: Tensor) -> Tensor:
        return w.square().sum() + u.sum()

    h = hypergradient(Level(upper_f, u, [w], u), Level(f, [w], [w], u), case.estimator)
    assert [(x.shape, x.dtype) for x in h] == [(x.shape, x.dtype) for x in u]


@cases()
def test_a_stationary_upper_loss_gives_the_direct_term_and_keeps_the_state(case: Case) -> None:
    """∂F/∂w is None, or exactly 0: a solver that divides by its norm would return NaN."""
    quadratic = program(0)
    state = open_oracle(*quadratic.levels()).estimate(case.estimator).state
    _, lower = quadratic.levels()
    here = flat(quadratic.w).detach()
    for share in (0, 1):

        def upper_f(w: Tensor, u: Tensor, share: int = share) -> Tensor:
            return u.square().sum() + (share * (w - here).square().sum() if share else 0)

        upper = Level(upper_f, quadratic.u, quadratic.w, quadratic.u)
        oracle = open_oracle(upper, lower)
        oracle.state = state
        result = oracle.estimate(case.estimator)
        assert torch.equal(flat(result.hypergradient), 2 * flat(quadratic.u))
        assert result.state is state or case.kind not in ("implicit", "penalty")


@cases()
def test_a_lower_loss_without_u_gives_the_direct_term(case: Case) -> None:
    quadratic = program(0)
    upper, _ = quadratic.levels()
    h, c, w, u = quadratic.h, quadratic.c, quadratic.w, quadratic.u
    lower = Level(lambda w, u: w @ h @ w / 2 + c @ w, w, w, u)
    actual = flat(hypergradient(upper, lower, case.estimator))
    tolerance = case.tolerance if case.kind == "penalty" else 1e-14
    assert_close(actual, quadratic.direct, quadratic.direct, tolerance)


@pytest.mark.parametrize("method", ["darts:", "cg:damping=5,"])
@pytest.mark.parametrize("product", ["exact", "difference"])
def test_variables_that_a_loss_does_not_read(method: str, product: str) -> None:
    """Upper ones that only one loss reads, lower ones that neither does."""
    w, u, unread_w, read_u, unread_u = (
        torch.full((2,), x, dtype=torch.float64, requires_grad=True) for x in range(1, 6)
    )

    def estimated(w_owned: list[Tensor], u_owned: list[Tensor]) -> tuple[Tensor, ...]:
        upper = FunctionLevel(lambda _: w.square().sum() + read_u.square().sum(), u_owned)
        lower = FunctionLevel(lambda _: (w.exp() * u).sum() + (w - u) @ (w - u), w_owned)
        return hypergradient(upper, lower, f"{method}product={product}")

    actual, of_read, of_unread = estimated([w, unread_w], [u, read_u, unread_u])
    assert torch.equal(of_read, 2 * read_u) and torch.equal(of_unread, 0 * unread_u)
    torch.testing.assert_close(actual, *estimated([w], [u]), rtol=1e-6, atol=1e-9)


@cases()
def test_tensors_that_no_level_owns_are_constants(case: Case) -> None:
    """Neither frozen tensors nor trainable ones of nobody change the result or get a gradient."""
    quadratic = program(0)
    upper, lower = quadratic.levels()
    expected = estimate(case, quadratic)
    frozen = torch.zeros((), dtype=torch.float64)
    nobodys = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def with_others(level: Level) -> Level:
        loss = lambda w, u: level.objective(w + nobodys + frozen, u + nobodys * frozen)  # noqa: E731
        return Level(loss, level.variables, quadratic.w, quadratic.u)

    actual = flat(hypergradient(with_others(upper), with_others(lower), case.estimator))
    assert_close(actual, expected, expected, case.rounding)
    assert nobodys.grad is None and frozen.grad is None
