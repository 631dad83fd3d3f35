"""An Engine whose lower level is solved before each upper step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine, Nested, ProblemError, attribute
from tests.support.differences import displace, gradient
from tests.support.quadratic import FunctionLevel


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(2, 40, 4, dtype=torch.float64), torch.randint(3, (2, 40))
    return x[0], y[0], x[1], y[1]


def levels(
    optimizer: Callable[[Any], Any] | None = None, broken: bool = False
) -> tuple[FunctionLevel, FunctionLevel]:
    """A head with a learned penalty a feature, judged by other rows."""
    x, y, x_val, y_val = data()
    u = torch.full((4,), -2.0, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)

    def f(_: Any) -> Tensor:
        penalty = (u.exp() @ w.square()).sum()
        loss = cross_entropy(x @ w, y) + penalty
        return loss / (w.norm() < 0.1) if broken else loss  # infinite after some steps

    upper = FunctionLevel(lambda _: cross_entropy(x_val @ w, y_val), [u], lr=1.0)
    return upper, FunctionLevel(f, [w], optimizer=optimizer and optimizer([w]))


def moved_upper_loss(shift: Tensor) -> float:
    upper, lower = levels()
    displace(upper.variables, shift)
    Engine(upper, lower, "direct", lower_steps="minimum", progress=False)._step_lower()
    return float(upper.loss(None))


def test_the_hypergradient_is_the_derivative_at_the_minimum() -> None:
    upper, lower = levels()
    start = upper.variables[0].detach().clone()
    (record,) = Engine(upper, lower, "exact", lower_steps="minimum", progress=False).run(1)
    assert record["lower_grad_norm"] < 1e-3
    moved = start - upper.variables[0].detach()  # dF/du, by a rate of 1
    expected = gradient(moved_upper_loss, 4, step=0.01)
    torch.testing.assert_close(moved, expected, rtol=0.02, atol=2e-5)


def test_a_resumed_run_is_bit_identical() -> None:
    whole, half = levels(), levels()
    engines = [Engine(*each, "cg", lower_steps="minimum", progress=False) for each in (whole, half)]
    history = engines[0].run(6)
    engines[1].run(3)
    other = levels()
    resumed = Engine(*other, "cg", lower_steps="minimum", progress=False)
    resumed.load_state_dict(engines[1].state_dict())
    assert resumed.run(3) == history[3:]
    assert all(
        torch.equal(a.variables[0], b.variables[0]) for a, b in zip(whole, other, strict=True)
    )


def test_a_solution_that_is_not_finite_moves_nothing() -> None:
    upper, lower = levels(broken=True)
    engine = Engine(upper, lower, "cg", lower_steps="minimum", non_finite="skip", progress=False)
    engine.run(1)
    assert engine.skipped == 2 and not lower.variables[0].any()


@pytest.mark.parametrize("name", ["unrolled", "sama", "forward"])
def test_estimators_that_need_the_optimizers_steps_are_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=f'{name}: .*choose a solver, such as "minres"'):
        Engine(*levels(), name, lower_steps="minimum", progress=False)


def test_an_optimizer_that_is_not_used_and_a_chain_are_refused() -> None:
    with pytest.raises(ProblemError, match="does not use the level's optimizer; remove"):
        Engine(*levels(lambda w: torch.optim.SGD(w, lr=0.1)), lower_steps="minimum")
    middle, lowest = levels(lambda w: torch.optim.SGD(w, lr=0.1))
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    top = FunctionLevel(lambda _: z.sum(), [z], lr=0.1)
    with pytest.raises(ProblemError, match='lower_steps="minimum" solves one level'):
        Engine(top, Nested(middle, lowest), lower_steps="minimum")


def test_rows_of_a_solved_level_have_no_steps_to_score() -> None:
    engine = Engine(*levels(), "direct", lower_steps="minimum", progress=False)
    weights = torch.ones(40, requires_grad=True)
    with pytest.raises(ProblemError, match="number of lower_steps"):
        attribute(engine, weights, lambda: engine.upper.loss(None), training_steps=1)
