"""`f2sa`: its closed form, its order, its single loop, and where it ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import Engine, hypergradient
from hyperopt_peft.hypergradients import Estimate, Vector, get_estimator
from hyperopt_peft.hypergradients.contrib import F2SA
from hyperopt_peft.hypergradients.estimate import open_oracle
from hyperopt_peft.problems import Sources
from hyperopt_peft.problems.textbook import logistic
from tests.support.newton import minimise
from tests.support.quadratic import (
    Level,
    Program,
    flat,
    normal,
    positive,
    program,
    relative_error,
    rotation,
    symmetric,
)

LONG = "inner_steps=3000,tolerance=1e-11"


def displaced(seed: int) -> Program:
    """With w away from the minimum of f, and a minimum of f + F/λ far from w."""
    quadratic = program(seed)
    with torch.no_grad():
        for part in quadratic.w:
            part.add_(torch.linspace(-1, 1, part.numel(), dtype=part.dtype).reshape(part.shape))
    return quadratic


def curved(eigenvalues: Tensor) -> tuple[Level, Level]:
    """A program's levels, with another lower Hessian."""
    quadratic, h = program(0), symmetric(eigenvalues, torch.Generator().manual_seed(1))
    w, u = quadratic.w, quadratic.u
    return quadratic.levels()[0], Level(
        lambda w, u: w @ h @ w / 2 + w @ quadratic.c_mixed @ u, w, w, u
    )


def asked(levels: Any, method: str, state: Any = None) -> tuple[Estimate, int]:
    """An estimate and the passes that it cost."""
    oracle = open_oracle(*levels, seed=0)
    oracle.state = state or {}
    return oracle.estimate(get_estimator(method)), oracle.passes.gradients


def penalised(q: Program, multiplier: float) -> Tensor:
    """The gradient of min_y F + λ(f − ⟨∂f/∂w(w), ·⟩), where y − w = −(λH + P)⁻¹b."""
    x = -torch.linalg.solve(multiplier * q.h + q.p_matrix, q.b)
    return q.direct + q.r.T @ x + multiplier * q.c_mixed.T @ x


@pytest.mark.parametrize("multiplier", [2.0, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_gradient_of_the_penalised_minimum(multiplier: float, seed: int) -> None:
    q = displaced(seed)
    method = f"f2sa:growth=0.0,multiplier={multiplier},{LONG}"
    first, _ = asked(q.levels(), method)
    assert relative_error(flat(first.hypergradient), penalised(q, multiplier)) < 1e-9
    again, _ = asked(q.levels(), method, first.state)
    assert relative_error(flat(again.hypergradient), penalised(q, multiplier)) < 1e-9
    assert again.steps == 1


def test_scalebio_has_a_constant_multiplier_and_several_steps() -> None:
    q, method = displaced(0), Sources.published("scalebio").defaults["hypergradient"]
    result, _ = asked(q.levels(), method)
    for _ in range(20):
        result, passes = asked(q.levels(), method, result.state)
        assert passes <= get_estimator(method).cost() - 1
    expected, exact = penalised(q, 100.0), q.direct + q.exact_implicit
    assert relative_error(flat(result.hypergradient), expected) < 0.005
    assert relative_error(exact, expected) > 0.01


def test_a_large_multiplier_gives_the_exact_hypergradient_at_order_one() -> None:
    q = displaced(0)
    actual = hypergradient(*q.levels(), f"f2sa:multiplier=1e6,{LONG}")
    assert relative_error(actual, q.direct + q.exact_implicit) < 1e-5
    upper, lower = logistic.breast_cancer()
    minimise(lower)
    exact = flat(hypergradient(upper, lower, "exact"))
    near, far = (
        relative_error(hypergradient(upper, lower, f"f2sa:multiplier={m},{LONG}"), exact)
        for m in (2e3, 1e3)
    )
    assert far / near == pytest.approx(2, rel=0.03)
    assert near > 1e-7  # the inner steps', and rounding, are far below


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_loop_continues_the_response(inner_steps: int) -> None:
    """r ← r − g/2h from step to step, by the passes of F and f at w and at each point."""
    q, estimator = displaced(1), F2SA(inner_steps=inner_steps, multiplier=10.0, tolerance=0.0)
    state = asked(q.levels(), "f2sa:multiplier=10.0")[0].state
    for k in range(1, 5):
        oracle = open_oracle(*q.levels())
        oracle.state = state
        result = oracle.estimate(estimator)
        assert oracle.passes.gradients + 1 == estimator.cost()
        m, h = 10.0 + k, 0.97 * state["curvature"]
        a, response = q.h + q.p_matrix / m, flat(state["response"])
        moved = response
        for _ in range(inner_steps):
            gradient, x = q.b + a @ response, response / m
            h = max(h, float((a @ moved).norm() / moved.norm()))
            moved, response = -gradient / (2 * h), response - gradient / (2 * h)
        expected = q.direct + q.r.T @ x + m * q.c_mixed.T @ x
        assert relative_error(flat(result.hypergradient), expected) < 1e-9
        assert result.residual == pytest.approx(float(gradient.norm() / q.b.norm()), rel=1e-9)
        state = result.state
        assert relative_error(flat(state["response"]), response) < 1e-9
        assert state["curvature"] == pytest.approx(h) and state["multiplier"] == m + 1


def test_a_growing_multiplier_leads_to_the_solution() -> None:
    """f = ½(w − Cu)ᵀH(w − Cu), F = ½‖w − t‖² + ½‖u‖², so that u = Cᵀt/2 for a rotation C."""
    generator = torch.Generator().manual_seed(0)
    h, c, target = positive(6, generator), rotation(6, generator), normal(6)

    def error(method: str) -> float:
        w, u = (torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2))

        def upper_f(w: Tensor, u: Tensor) -> Tensor:
            return (w - target).square().sum() / 2 + u.square().sum() / 2

        upper = Level(upper_f, [u], [w], [u], lr=0.05)
        lower = Level(lambda w, u: (w - c @ u) @ h @ (w - c @ u) / 2, [w], [w], [u], lr=0.1)
        Engine(upper, lower, method, lower_steps=2, progress=False).run(400)
        return relative_error([u], [c.T @ target / 2])

    assert error("f2sa:multiplier=2.0,growth=0.0") > 0.02
    assert error("f2sa:multiplier=2.0,growth=1.0") < 2e-3


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**12])
def test_the_multiplier_has_the_units_of_the_upper_loss_by_the_lower(factor: float) -> None:
    """Bit for bit, since powers of two do not round."""
    q = displaced(0)
    plain = flat(hypergradient(*q.levels(), "f2sa:multiplier=128.0"))
    scaled = hypergradient(*q.levels(scale=factor), f"f2sa:multiplier={128 / factor}")
    assert torch.equal(flat(scaled), plain)


@pytest.mark.parametrize("sign", [-1, 0])
def test_without_curvature_there_is_the_direct_term(sign: int) -> None:
    quadratic = program(0)
    upper = Level(lambda w, u: w.sum() + u @ u, quadratic.u, quadratic.w, quadratic.u)
    lower = Level(lambda w, u: sign * w @ w + w @ u, quadratic.w, quadratic.w, quadratic.u)
    actual, _ = asked((upper, lower), "f2sa")
    assert (actual.note, actual.residual) == ("the curvature of f is not positive", 1.0)
    assert torch.equal(flat(actual.hypergradient), flat(actual.direct))
    # The response of an earlier step, along which f was convex, is given up; λ still grows.
    state = {"response": Vector(quadratic.w), "curvature": 1.0, "multiplier": 7.0}
    actual, _ = asked((upper, lower), "f2sa", state)
    assert dict(actual.state) == {"multiplier": 8.0}
    assert torch.equal(flat(actual.hypergradient), flat(actual.direct))


def test_steps_end_at_negative_curvature_and_say_so() -> None:
    """There is no minimum; the estimate is that of the last point before."""
    levels = curved(torch.linspace(-4, 10, 12, dtype=torch.float64))
    actual, passes = asked(levels, f"f2sa:{LONG}")
    assert actual.note == "the curvature of f is not positive" and actual.steps
    assert passes == 4 + 2 * actual.steps and actual.hypergradient.isfinite()
    shorter, _ = asked(levels, f"f2sa:tolerance=0.0,inner_steps={max(1, actual.steps - 40)}")
    assert torch.equal(flat(shorter.hypergradient), flat(actual.hypergradient))
