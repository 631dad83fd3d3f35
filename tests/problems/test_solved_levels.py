"""Levels at their minimum: which methods' upper variables the lower level absorbs."""

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from hyperopt_peft import Method, check_problem, hypergradient
from hyperopt_peft.engine import lbfgs
from hyperopt_peft.problems import AutoLoRA, BiLoRA, LayerDecay, LayerScales
from tests.support.adapted_models import layer_input, randomise, single
from tests.support.solved_levels import SGD, assign, flat


def regression(method: Method) -> Any:
    """Both levels of one adapted linear layer, in float64; the lower one is at a minimum."""
    model = randomise(single(use_dora=False))
    x = layer_input("linear")
    targets = torch.randn(2, 2, 3, 5, dtype=x.dtype)
    task = lambda row: mse_loss(model(x), targets[row])  # noqa: E731
    upper, lower = method.levels(model, task, data=([0], [1]), optimizers=[SGD, SGD])
    with torch.no_grad():
        for u in upper.variables:
            u += torch.linspace(0.1, 0.4, u.numel(), dtype=u.dtype).view_as(u)
    solve(lower)
    return upper, lower


def solve(lower: Any) -> None:
    """L-BFGS, then Newton's method in the directions that the loss depends on."""
    lbfgs(lower, 1, tolerance=1e-8, max_steps=5000)
    for _ in range(3):
        graph = torch.autograd.grad(lower.evaluate(1)[0], lower.variables, create_graph=True)
        slope = torch.cat([part.flatten() for part in graph])
        rows = [torch.autograd.grad(x, lower.variables, retain_graph=True) for x in slope]
        hessian = torch.stack([flat(row) for row in rows])
        step = torch.linalg.pinv(hessian, rtol=1e-7, hermitian=True) @ slope.detach()
        assign(lower, flat(lower.variables) - step)


@pytest.mark.parametrize("method", [AutoLoRA(), LayerScales(), BiLoRA(gamma=0)], ids=repr)
def test_a_solved_level_without_a_penalty_absorbs_the_upper_variables(method: Method) -> None:
    """F is constant and its gradient 0, while that of cheap estimators is not."""
    upper, lower = regression(method)
    estimators = ("direct", "darts:xi=1.0", "minres:steps=100,damping=0,tolerance=1e-10")
    direct, darts, exact = (flat(hypergradient(upper, lower, each)).norm() for each in estimators)
    assert exact < 1e-5 * direct and darts > 0.01 * direct > 1e-4
    check = check_problem(upper, lower, solver_steps=40, progress=False)
    assert method.absorbed and "absorbed" in [finding.kind for finding in check.findings]
    before = float(upper.evaluate(0)[0])
    u = flat(upper.variables)
    assign(upper, u + torch.linspace(0.3, -0.2, len(u), dtype=u.dtype))
    assert float(upper.evaluate(0)[0]) != pytest.approx(before, rel=1e-3)
    solve(lower)
    assert float(upper.evaluate(0)[0]) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [AutoLoRA(decay=0.05), LayerScales(decay=0.05), BiLoRA(gamma=0.1), LayerDecay(start=-3.0)],
    ids=repr,
)
def test_a_penalty_gives_the_hypergradient_of_solved_levels(method: Method) -> None:
    upper, lower = regression(method)
    estimator = "minres:steps=200,damping=0,tolerance=1e-10"
    gradient, u = flat(hypergradient(upper, lower, estimator)), flat(upper.variables)
    check = check_problem(upper, lower, solver_steps=40, progress=False)
    kinds = [finding.kind for finding in check.findings]
    assert not method.absorbed and "absorbed" not in kinds
    towards = torch.linspace(-1, 2, len(u), dtype=u.dtype)
    values = []
    for shift in (1e-4, -1e-4):
        assign(upper, u + shift * towards)
        solve(lower)
        values.append(float(upper.evaluate(0)[0]))
    assert float(gradient @ towards) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)
    assert gradient.norm() > 1e-4
