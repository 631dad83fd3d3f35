"""Levels at their minimum: which methods' upper variables the lower level absorbs."""

from __future__ import annotations

import pytest
import torch

from hyperopt_peft import Method, check_problem, hypergradient
from hyperopt_peft.problems import AutoLoRA, BiLoRA, LayerDecay, LayerScales
from tests.support.solved_levels import assign, flat, regression, solve


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
