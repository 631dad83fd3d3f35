"""One level alone, trained or solved, and an Engine that solves its lower level."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from hyperopt_peft import Engine, Nested, NonFiniteError, ProblemError
from hyperopt_peft.engine import fit, minimize
from hyperopt_peft.problems.textbook import ridge
from tests.support.differences import displace, gradient
from tests.support.quadratic import FunctionLevel


def level(data: list[float], **options: Any) -> FunctionLevel:
    w = torch.tensor([1.0], requires_grad=True)

    def loss(factor: float) -> dict[str, Any]:
        return {"loss": (factor * w.square()).sum(), "factor": factor}

    return FunctionLevel(loss, [w], data=data, optimizer=SGD([w], lr=0.1), name="fit", **options)


def test_fit_does_the_steps_of_the_optimizer_and_records_them() -> None:
    problem = level([1.0, 2.0])
    history = fit(problem, 3, progress=False)
    w, expected = 1.0, []
    for step, factor in enumerate((1.0, 2.0, 1.0), start=1):
        record = {"step": step, "loss": factor * w * w, "grad_norm": 2 * factor * w}
        expected.append(record | {"factor": factor})
        w -= 0.1 * 2 * factor * w
    assert history == [pytest.approx(record, rel=1e-6) for record in expected]
    assert problem.variables[0].item() == pytest.approx(w)


def test_a_loss_that_is_not_finite_ends_the_fit_at_a_named_step() -> None:
    problem = level([1.0, math.nan])
    with pytest.raises(NonFiniteError, match=r"step 2: fit: .*loss"):
        fit(problem, 3, progress=False)
    assert problem.variables[0].item() == pytest.approx(0.8)


def test_minimize_reaches_the_closed_form_and_leaves_the_optimizer_alone() -> None:
    _, lower = ridge.diabetes()
    _, solved = ridge.diabetes()
    solved.solve()
    loss = minimize(lower)
    torch.testing.assert_close(lower.w, solved.w, rtol=0, atol=1e-8)
    assert loss == pytest.approx(solved.evaluate(None)[0].item(), rel=1e-12)
    assert lower.w.grad is None
    assert lower.optimizer is not None and not lower.optimizer.state


def test_minimize_says_where_there_is_no_minimum_in_reach() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    unbounded = FunctionLevel(lambda _: (-w).exp().sum(), [w], name="fit")
    with pytest.raises(ProblemError, match=r"fit: .*3 steps"):
        minimize(unbounded, max_steps=3)


def levels(
    optimizer: Callable[[Any], Any] | None = None, broken: bool = False
) -> tuple[FunctionLevel, FunctionLevel]:
    """A head with a learned penalty a feature, judged by other rows."""
    torch.manual_seed(0)
    (x, x_val), (y, y_val) = torch.randn(2, 40, 4, dtype=torch.float64), torch.randint(3, (2, 40))
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


@pytest.mark.parametrize("name", ["unrolled", "sama"])
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
