"""A prior is a term of the level's objective, counted once by whatever evaluates the level."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hyperopt_peft import Engine, ProblemError, check_problem, hypergradient
from hyperopt_peft.engine import fit
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState
from tests.support.cases import Case, cases
from tests.support.chains import chain, nested
from tests.support.quadratic import FunctionLevel, Program, flat, program, programs

TAU = 3.0


def moved(leaves: Any, seed: int = 0) -> Tensor:
    """Move each leaf; returns all moves as one vector."""
    generator = torch.Generator().manual_seed(seed)
    moves = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in leaves]
    with torch.no_grad():
        for leaf, move in zip(leaves, moves, strict=True):
            leaf += move
    return flat(moves)


def upper_of(quadratic: Program, prior: Any = None) -> FunctionLevel:
    loss = lambda _: quadratic.upper_f(flat(quadratic.w), flat(quadratic.u))  # noqa: E731
    return FunctionLevel(loss, quadratic.u, lr=0.05, prior=prior, name="upper")


def lower_of(quadratic: Program, prior: Any = None) -> FunctionLevel:
    loss = lambda _: quadratic.f(flat(quadratic.w), flat(quadratic.u))  # noqa: E731
    return FunctionLevel(loss, quadratic.w, lr=0.05, prior=prior, name="lower")


@given(quadratic=programs(), weight=st.floats(0, 100), seed=st.integers(0, 1000))
def test_a_number_weighs_a_mean_square(quadratic: Program, weight: float, seed: int) -> None:
    plain, level = upper_of(quadratic), upper_of(quadratic, weight)
    move = moved(quadratic.u, seed)
    expected = weight / 2 * float(move.square().mean())
    found, without = (x.gradient(None, x.variables) for x in (level, plain))
    assert found.metrics["prior"] == pytest.approx(expected, rel=1e-12)
    assert found.loss == pytest.approx(without.loss + expected, rel=1e-12)
    slope = flat(found.gradient) - flat(without.gradient)
    torch.testing.assert_close(slope, weight / len(move) * move, rtol=1e-9, atol=1e-12)


def test_a_function_gets_the_variables() -> None:
    quadratic = program(0)
    prior = lambda variables: sum(x.cosh().log().sum() for x in variables)  # noqa: E731
    plain, level = upper_of(quadratic), upper_of(quadratic, prior)
    found, without = (x.gradient(None, x.variables) for x in (level, plain))
    slope = flat(found.gradient) - flat(without.gradient)
    torch.testing.assert_close(slope, flat(quadratic.u).tanh().detach())


# A solve that stops early is the same early with and without a prior above.
@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
@cases()
def test_every_estimator_adds_the_slope_of_the_upper_prior(case: Case) -> None:
    quadratic = program(1)
    uppers, lower = [upper_of(quadratic), upper_of(quadratic, TAU)], lower_of(quadratic)
    move = moved(quadratic.u)
    without, found = (flat(hypergradient(x, lower, case.estimator)) for x in uppers)
    error = found - without - TAU / len(move) * move
    assert error.norm() < 100 * case.rounding * without.norm()


@pytest.mark.parametrize("method", ["exact", "cg:steps=50,tolerance=1e-14", "darts:product=exact"])
def test_the_lower_prior_is_in_the_hessian(method: str) -> None:
    """H + τ/n·I in place of H; darts has no H."""
    quadratic = program(2)
    lower = lower_of(quadratic, TAU)
    moved(quadratic.w)
    found = flat(hypergradient(upper_of(quadratic), lower, method))
    h = quadratic.h + TAU / len(quadratic.h) * torch.eye(len(quadratic.h)).double()
    v = quadratic.b if method.startswith("darts") else torch.linalg.solve(h, quadratic.b)
    expected = quadratic.direct + quadratic.implicit(v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_micro_batches_have_one_prior_together() -> None:
    count = 3
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    level = FunctionLevel(lambda x: (w * x).sum(), [w], prior=TAU)
    move = moved([w])
    state = RandomState.capture()
    batch = [MicroBatch(torch.full((2,), float(k)).double(), state) for k in range(count)]
    whole = Accumulated(level)
    prior = TAU / 2 * float(move.square().mean())
    task = (count - 1) / 2 * float(w.sum())
    found = whole.gradient(batch, whole.variables)
    assert found.loss == pytest.approx(task + prior, rel=1e-12)
    assert found.metrics["prior"] == pytest.approx(prior, rel=1e-12)
    expected = (count - 1) / 2 + TAU / 2 * move
    torch.testing.assert_close(found.gradient[0], expected)
    loss, _ = whole.evaluate(batch)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], expected)


def test_a_chain_has_the_prior_of_each_level_once() -> None:
    """The prior of x_k adds τ/n_k to the diagonal block of A_k, and pulls to where x_k began."""
    quadratics = chain(3)
    plain = quadratics.levels()
    with_priors = [
        FunctionLevel(level.function, level.variables, optimizer=level.optimizer, prior=TAU)
        for level in plain
    ]
    starts = [x.detach().clone() for x in quadratics.blocks]
    for k, x in enumerate(quadratics.blocks):
        moved([x], seed=k)
    found = flat(hypergradient(*nested(with_priors), "exact:product=difference,epsilon=1.0"))
    begin = 0
    for k, start in enumerate(starts):
        block, pull = slice(begin, begin + len(start)), TAU / len(start)
        quadratics.matrices[k][block, block].diagonal().add_(pull)
        quadratics.vectors[k][block] -= pull * start
        begin += len(start)
    torch.testing.assert_close(found, quadratics.hypergradient(), rtol=1e-8, atol=1e-8)


def test_records_have_losses_without_the_prior() -> None:
    quadratic = program(4)
    upper, lower = upper_of(quadratic, TAU), lower_of(quadratic, 2 * TAU)
    moves = moved(quadratic.u), moved(quadratic.w)
    values = [float(upper_of(quadratic).evaluate(None)[0]), 0.0]
    values[1] = float(lower_of(quadratic).evaluate(None)[0])
    lower.optimizer.param_groups[0]["lr"] = 0.0
    (record,) = Engine(upper, lower, "exact", progress=False).run(1)
    for key, value, move, tau in zip(("upper", "lower"), values, moves, (TAU, 2 * TAU)):
        assert record[f"{key}_loss"] == pytest.approx(value, rel=1e-12)
        expected = tau / 2 * float(move.square().mean())
        assert record[f"{key}_prior"] == pytest.approx(expected, rel=1e-12)
    (record,) = fit(lower, 1, progress=False)
    moved_above = float(lower_of(quadratic).evaluate(None)[0])
    assert record["loss"] == pytest.approx(moved_above, rel=1e-12)
    assert record["prior"] == pytest.approx(TAU * float(moves[1].square().mean()), rel=1e-12)


def test_an_upper_variable_that_the_prior_alone_reads_is_named() -> None:
    """One that the lower loss reads is not."""
    u, w, unused = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    named = [("u", u), ("unused", unused)]
    upper = FunctionLevel(lambda _: w.square().sum(), named, lr=0.1, prior=TAU)
    lower = FunctionLevel(lambda _: (w - u).square().sum(), [w], lr=0.1)
    (error,) = (f for f in check_problem(upper, lower, progress=False).findings)
    assert error.kind == "unread variable" and "'unused'" in error.words
    upper.evaluated.half = None  # not yet evaluated
    with pytest.raises(ProblemError, match="'unused'"):
        Engine(upper, lower, "cg", progress=False).run(1)


def test_half_precision_is_widened() -> None:
    u = torch.ones(100, dtype=torch.bfloat16, requires_grad=True)
    level = FunctionLevel(lambda _: u.float().sum(), [u], prior=2.0)
    with torch.no_grad():
        u += 2**-6
    found = level.gradient(None, [u])
    assert found.metrics["prior"] == pytest.approx(2**-12, rel=1e-6)
    assert found.gradient[0].dtype == torch.bfloat16


def test_a_state_has_the_values_that_the_prior_pulls_to() -> None:
    """The level that goes on was made elsewhere."""
    quadratic, other = program(5), program(5)
    whole = Engine(upper_of(quadratic, TAU), lower_of(quadratic), "exact", progress=False)
    whole.run(2)
    state = whole.state_dict()
    whole.run(3)
    moved(other.u)
    resumed = Engine(upper_of(other, TAU), lower_of(other), "exact", progress=False)
    resumed.load_state_dict(state)
    resumed.run(3)
    assert torch.equal(flat(other.u), flat(quadratic.u)) and resumed.history == whole.history
    without = Engine(upper_of(program(5)), lower_of(program(5)), "exact", progress=False)
    with pytest.raises(ProblemError, match="prior"):
        without.load_state_dict(state)


@pytest.mark.parametrize("prior", [-1.0, math.nan, "0.1", True, lambda _: 1.0, lambda u: u[0]])
def test_a_prior_that_is_none_is_refused(prior: Any) -> None:
    u = torch.ones(2, requires_grad=True)
    with pytest.raises(ProblemError, match="prior"):
        FunctionLevel(lambda _: u.sum(), [u], prior=prior).gradient(None, [u])
