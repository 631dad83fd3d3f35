"""Training one level alone, and solving it."""

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD

from hyperopt_peft import NonFiniteError, ProblemError
from hyperopt_peft.engine import fit, minimize
from hyperopt_peft.problems.textbook import ridge
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
