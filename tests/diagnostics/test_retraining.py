"""The finite-difference hypergradient: closed forms, unrolled steps, errors, and no trace."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from hyperopt_peft import NonFiniteError, compare_hypergradients, hypergradient
from hyperopt_peft.diagnostics.retraining import Retraining
from hyperopt_peft.hypergradients.estimate import open_oracle
from hyperopt_peft.hypergradients.registry import get_estimator
from hyperopt_peft.utils.random_state import RandomState
from tests.support.learned_options import Learned
from tests.support.networks import differences, give_gradients, network_levels, snapshot
from tests.support.optimizers import OPTIMIZERS
from tests.support.quadratic import FunctionLevel, Level, Program, flat, program, relative_error

SMALL: dict[str, Any] = {"w_shapes": [(2,), ()], "u_shapes": [(), (2,)]}
# Polyak's best rate and momentum for eigenvalues from 1 to 10: errors halve with each step.
RATE, MOMENTUM = 4 / (10**0.5 + 1) ** 2, ((10**0.5 - 1) / (10**0.5 + 1)) ** 2


def quick_levels(quadratic: Program, scale: float = 1.0) -> tuple[Level, Level]:
    """Levels of which the lower one is trained to its end in some thirty steps."""
    upper, lower = quadratic.levels(scale=scale)
    lower.optimizer = torch.optim.SGD(lower.variables, lr=RATE / scale, momentum=MOMENTUM)
    return upper, lower


def linear_above(seed: int = 0) -> Program:
    """A program whose F is linear in w, so that it does not matter where F is differentiated."""
    quadratic = program(seed, **SMALL)
    zero = torch.zeros_like(quadratic.r)
    moved = replace(quadratic, p_matrix=zero, r=zero)
    for leaf in moved.w:
        leaf.data += 0.5
    return moved


@pytest.mark.parametrize("seed", range(2))
def test_long_retrainings_are_the_closed_form(seed: int) -> None:
    quadratic = program(seed, **SMALL)
    expected = quadratic.direct + quadratic.exact_implicit
    method = Retraining(steps=30, directions=3)
    assert relative_error(flat(hypergradient(*quick_levels(quadratic), method)), expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "max_grad_norm"), [("nesterov", None), ("adamw", None), ("sgd", 0.5), ("rate", None)]
)
def test_short_retrainings_are_the_unrolled_steps(name: str, max_grad_norm: float | None) -> None:
    """By the level's own optimizer, whose state is that of some steps before, or at a rate."""
    quadratic = linear_above()
    upper, lower = quadratic.levels()
    kind, options = OPTIMIZERS["sgd" if name == "rate" else name]
    lower.optimizer = kind(lower.variables, **options)
    lower.max_grad_norm = max_grad_norm
    for _ in range(2):
        lower.step(lower.gradient(None, lower.variables).gradient)
    expected = flat(hypergradient(upper, lower, "unrolled:steps=3"))
    lr = options["lr"] if name == "rate" else None
    actual = flat(hypergradient(upper, lower, Retraining(steps=3, directions=3, lr=lr)))
    assert relative_error(actual, expected) < 1e-7


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
def test_options_of_the_optimizer_may_be_functions_of_u() -> None:
    """The learning rate is the exponential of u."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    u = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    lower = Learned(lambda _: w.square().sum(), [w], lambda: {"lr": u.exp()}, lr=0.1)
    upper = FunctionLevel(lambda _: w.sum(), [u])
    expected = flat(hypergradient(upper, lower, "unrolled:steps=3"))
    actual = flat(hypergradient(upper, lower, Retraining(steps=3)))
    assert expected.abs() > 0.1 and relative_error(actual, expected) < 1e-7


@pytest.mark.parametrize("steps", [4, 10])
def test_the_residual_bounds_what_more_steps_would_change(steps: int) -> None:
    quadratic = program(1, **SMALL)
    method = Retraining(steps=steps, directions=3, lr=0.1)
    result = open_oracle(*quadratic.levels()).estimate(get_estimator(method))
    error = relative_error(flat(result.hypergradient), quadratic.direct + quadratic.exact_implicit)
    assert result.residual is not None and 0.3 * error < result.residual < 1


COMPARED = {"estimators": ["darts", "cg:steps=2"], "reference": "retraining:steps=2,directions=1"}


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize(
    ("run", "error"),
    [
        (partial(hypergradient, estimator=Retraining(steps=3)), None),
        (partial(hypergradient, estimator=Retraining(steps=3, lr=1e30)), NonFiniteError),
        (partial(compare_hypergradients, **COMPARED), None),
    ],
)
def test_everything_is_bit_identical_afterwards(run: Any, error: Any) -> None:
    levels = network_levels()
    levels[1].step(levels[1].gradient(levels[1].next_batch(), levels[1].variables).gradient)
    give_gradients(levels[0].net)
    for level in levels:
        level.peek_batch()

    def state() -> Any:
        data = [deepcopy(level.state_dict()) for level in levels]
        return [snapshot(*levels), data, RandomState.capture().states]

    before = state()
    with pytest.raises(error) if error else nullcontext():
        run(*levels)
    assert not differences(before, state())


def test_both_sides_see_the_same_masks() -> None:
    """With masks of their own the quotient of two losses would be noise divided by ε."""
    levels = network_levels(dropout=0.5)
    oracle = open_oracle(*levels, seed=3)
    result = oracle.estimate(Retraining(steps=4, directions=2))
    assert result.residual is not None and result.residual < 1
    again = open_oracle(*levels, seed=3).estimate(Retraining(steps=4, directions=2))
    assert torch.equal(flat(result.hypergradient), flat(again.hypergradient))


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
def test_half_precision_variables_are_moved_in_single_precision() -> None:
    u = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    w = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    upper = FunctionLevel(lambda _: (w - 3).square().sum(), [u])
    adam = torch.optim.Adam([w], lr=0.01)
    lower = FunctionLevel(lambda _: (w - u).square().sum(), [w], optimizer=adam)
    lower.step(lower.gradient(None, [w]).gradient)
    before = w.detach().clone()
    actual = flat(hypergradient(upper, lower, Retraining(steps=12, directions=3, lr=0.25)))
    torch.testing.assert_close(actual.float(), torch.full((3,), -4.0), rtol=2e-2, atol=0)
    hypergradient(upper, lower, Retraining(steps=2))  # by the twin of Adam
    assert torch.equal(w, before)


METHODS = ["direct", "darts", "minres:steps=3"]


def test_with_all_directions_the_rows_are_those_against_the_truth() -> None:
    levels = quick_levels(program(2, **SMALL))
    truth = compare_hypergradients(*levels, METHODS, "exact", repeats=1)
    reference = "retraining:steps=30,directions=3"
    actual = compare_hypergradients(*levels, METHODS, reference, repeats=1)
    for a, b in zip(truth.rows, actual.rows, strict=True):
        assert b.cosine == pytest.approx(a.cosine, abs=1e-5)
        assert b.relative_error == pytest.approx(a.relative_error, abs=1e-4)
        assert b.factor == pytest.approx(a.factor, abs=1e-4, nan_ok=True)
    assert actual.reference_residual is not None and actual.reference_residual < 1e-3
    assert "relative error" in str(actual).splitlines()[-1]


def test_a_dominating_damping_flatters_darts_and_the_retraining_does_not() -> None:
    quadratic = program(3)
    upper, lower = quick_levels(quadratic, 0.05)  # eigenvalues from 0.05 to 0.5
    method = "darts:xi=1"
    flattered = compare_hypergradients(upper, lower, method, "minres:damping=5", repeats=1)
    assert flattered.rows[0].cosine > 0.99
    assert "damping 5 dominates the Hessian" in flattered.reference_note
    assert "damping 5 dominates the Hessian" in str(flattered)
    reference = "retraining:steps=20,directions=1"
    free = compare_hypergradients(upper, lower, method, reference, repeats=1)
    assert free.rows[0].cosine < 0.95
