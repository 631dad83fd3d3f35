"""`f2sa` and `penalty`: closed forms, orders and scales."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import HypergradientWarning, Problem, hypergradient
from hyperopt_peft.hypergradients import Estimate, get_estimator
from hyperopt_peft.hypergradients.contrib import F2SA, penalty
from hyperopt_peft.hypergradients.estimate import open_oracle
from hyperopt_peft.problems.textbook import logistic
from tests.support.newton import minimise
from tests.support.quadratic import Level, Program, flat, program, relative_error, symmetric

LONG = "inner_steps=200,tolerance=1e-11"


def displaced(quadratic: Program) -> Program:
    """With w away from the minimum of f."""
    with torch.no_grad():
        for part in quadratic.w:
            part.add_(torch.linspace(-1, 1, part.numel(), dtype=part.dtype).reshape(part.shape))
    return quadratic


def curved(quadratic: Program, eigenvalues: Tensor, seed: int) -> tuple[Level, Level]:
    """The program's levels, with another lower Hessian."""
    h = symmetric(eigenvalues, torch.Generator().manual_seed(seed))
    w, u = quadratic.w, quadratic.u
    lower = Level(lambda w, u: w @ h @ w / 2 + w @ quadratic.c_mixed @ u, w, w, u)
    return quadratic.levels()[0], lower


def asked(levels: Any, method: str, state: Any = None) -> tuple[Estimate, int]:
    """An estimate and the passes that it cost."""
    oracle = open_oracle(*levels, seed=0)
    oracle.state = state or {}
    return oracle.estimate(get_estimator(method)), oracle.passes.gradients


@pytest.fixture(scope="module")
def cancer() -> tuple[Problem, Problem]:
    """Problem A at the lower optimum for l = −2."""
    upper, lower = logistic.breast_cancer()
    minimise(lower)
    return upper, lower


@pytest.mark.parametrize(
    ("method", "lengths", "order"), [("f2sa", (0.01, 0.005), 2), ("penalty", (1e-3, 5e-4), 1)]
)
def test_errors_fall_at_their_order(
    cancer: tuple[Problem, Problem],
    method: str,
    lengths: tuple[float, float],
    order: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In ν and in 1/γ."""
    exact, errors = flat(hypergradient(*cancer, "exact")), []
    for length in lengths:
        monkeypatch.setattr(F2SA, "_nu", lambda *_, nu=length: nu)
        monkeypatch.setattr(penalty, "GAMMA", 1 / length)
        errors.append(relative_error(hypergradient(*cancer, f"{method}:{LONG}"), exact))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.03)
    assert errors[1] > 1e-7  # the inner runs', and rounding, are far below


@pytest.mark.parametrize("method", [f"f2sa:{LONG}", f"penalty:{LONG}"])
@pytest.mark.parametrize("seed", range(3))
def test_away_from_the_minimum_they_tend_to_the_implicit_formula(method: str, seed: int) -> None:
    """A minimum of this f is far from w; and on a quadratic the penalty's estimate is exact."""
    quadratic = displaced(program(seed))
    actual = flat(hypergradient(*quadratic.levels(), method))
    assert relative_error(actual, quadratic.direct + quadratic.exact_implicit) < 1e-7


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**12])
def test_scales_of_f_and_of_the_upper_loss_change_nothing(factor: float) -> None:
    """Bit for bit, since powers of two do not round."""
    quadratic = displaced(program(0))
    upper, lower = quadratic.levels()
    plain = flat(hypergradient(upper, lower, "f2sa"))
    _, scaled = quadratic.levels(scale=factor)
    assert torch.equal(flat(hypergradient(upper, scaled, "f2sa")), plain)
    loud = Level(
        lambda w, u: factor * quadratic.upper_f(w, u), quadratic.u, quadratic.w, quadratic.u
    )
    assert torch.equal(flat(hypergradient(loud, lower, "f2sa")), factor * plain)


def test_a_small_gradient_makes_nu_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where w is all but F's minimum, a displacement of fixed length asks for a ν of 1000."""
    quadratic = program(0)
    here = flat(quadratic.w).detach() + 1e-7
    upper = Level(
        lambda w, u: 50 * (w - here).square().sum(), quadratic.u, quadratic.w, quadratic.u
    )
    _, lower = quadratic.levels()
    exact = flat(hypergradient(upper, lower, "exact"))
    assert relative_error(hypergradient(upper, lower, f"f2sa:{LONG}"), exact) < 1e-3
    monkeypatch.setattr(F2SA, "_nu", lambda *_: 1.0)
    with pytest.warns(HypergradientWarning, match="f2sa"):
        far = flat(hypergradient(upper, lower, f"f2sa:{LONG}"))
    assert relative_error(far, exact) > 0.1


@pytest.mark.parametrize(("method", "passes"), [("f2sa", 8), ("penalty", 4)])
def test_runs_start_where_they_ended(method: str, passes: int) -> None:
    levels = displaced(program(1)).levels()
    first, cost = asked(levels, f"{method}:tolerance=1e-5")
    again, warm = asked(levels, f"{method}:tolerance=1e-5", first.state)
    assert warm == passes < cost and again.steps == 0
    assert again.residual is not None and again.residual <= 1e-4
    assert relative_error(flat(again.hypergradient), flat(first.hypergradient)) < 1e-3
    cold, _ = asked(levels, f"{method}:inner_steps=0")
    assert cold.residual is not None and cold.residual > 0.1


@pytest.mark.parametrize("method", ["f2sa", "penalty"])
@pytest.mark.parametrize("sign", [-1, 0])
def test_without_curvature_there_is_the_direct_term(method: str, sign: int) -> None:
    quadratic = program(0)
    upper, _ = quadratic.levels()
    lower = Level(lambda w, u: sign * w @ w + w @ u, quadratic.w, quadratic.w, quadratic.u)
    actual, _ = asked((upper, lower), method)
    assert actual.note == "the curvature of f along ∂F/∂w is not positive"
    assert (actual.residual, actual.steps) == (1.0, 0)
    assert torch.equal(flat(actual.hypergradient), flat(actual.direct))


@pytest.mark.parametrize("method", ["f2sa", "penalty"])
@pytest.mark.parametrize("steps", [10, 200])
def test_runs_end_at_negative_curvature_and_say_so(method: str, steps: int) -> None:
    """There is no minimum; what is found is the point of least gradient, w at worst."""
    levels = curved(program(0), torch.linspace(-4, 10, 12, dtype=torch.float64), 1)
    actual, passes = asked(levels, f"{method}:inner_steps={steps}")
    assert actual.note == "negative curvature" and passes < 4 + 4 * steps
    assert actual.residual is not None and actual.residual < 1 and actual.hypergradient.isfinite()
