"""Levels at their minimum: which methods' upper variables the lower level absorbs."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hyperopt_peft import Method, check_problem, hypergradient
from hyperopt_peft.engine import lbfgs
from hyperopt_peft.problems import AutoLoRA, BiLoRA, LayerDecay, LayerScales
from tests.support.adapted_models import adapted_layer
from tests.support.solved_levels import assign, flat, regression, solve

SIX = LoraConfig(r=6, lora_alpha=6, target_modules=["0"])


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_autolora_finds_a_planted_rank(seed: int) -> None:
    """Of six terms with decay, two are above the mean, as many as the true update has."""
    torch.manual_seed(seed)
    method = AutoLoRA(decay=0.05)
    model = get_peft_model(nn.Sequential(nn.Linear(10, 8)).double(), SIX)
    base: Any = adapted_layer(model).get_base_layer()
    nn.init.zeros_(base.weight)
    for x in adapted_layer(model).parameters():
        if x.requires_grad:
            nn.init.normal_(x, std=0.3)
    x, noise = torch.randn(230, 10).double(), torch.randn(230, 8).double() / 2
    y = x @ (torch.randn(8, 2) @ torch.randn(2, 10) / 2).double().T + noise
    rows = [slice(0, 200), slice(200, 230)]
    task = lambda row: mse_loss(model(x[rows[row]]), y[rows[row]])  # noqa: E731
    adam = partial(torch.optim.Adam, lr=0.2)
    upper, lower = method.levels(model, task, data=([0], [1]), optimizers=[adam, adam])
    for _ in range(25):
        lbfgs(lower, 1, tolerance=1e-6, max_steps=500)
        upper.step(hypergradient(upper, lower, "minres:steps=40,damping=1e-6"))
    assert int((upper.variables[0].softmax(1) > 1 / 6).sum()) == 2


class Sum(nn.Module):
    """y = first(x) + second(z) of layers that begin at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.first(x) + self.second(z)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("method", [LayerScales(decay=0.05), LayerDecay(start=-3.0)], ids=repr)
def test_a_layer_of_a_spurious_feature_is_switched_off(method: Method, seed: int) -> None:
    """z follows from y in the lower level's rows, and is noise in the upper level's."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"])
    model = get_peft_model(Sum().double(), config)
    for each in model.parameters():
        if each.requires_grad:
            nn.init.normal_(each, std=0.3)
    x, noise, z = (torch.randn(2, 200, n).double() for n in (6, 4, 6))
    y = x @ (torch.randn(6, 2) @ torch.randn(2, 4)).double() / 2 + noise / 2
    z[1] = y[1] @ torch.randn(4, 6).double() / 2 + z[1] / 2
    rows = [slice(0, 200), slice(0, 60)]
    task = lambda k: mse_loss(model(x[k][rows[k]], z[k][rows[k]]), y[k][rows[k]])  # noqa: E731
    adam = partial(torch.optim.Adam, lr=0.4)
    upper, lower = method.levels(model, task, data=([0], [1]), optimizers=[adam, adam])
    losses = []
    for _ in range(15):
        lbfgs(lower, 1, tolerance=1e-6, max_steps=500)
        losses.append(float(upper.evaluate(0)[0]))
        upper.step(hypergradient(upper, lower, "minres:steps=40,damping=1e-6"))
    lbfgs(lower, 1, tolerance=1e-6, max_steps=500)
    assert float(upper.evaluate(0)[0]) < 0.7 * losses[0]
    first, second = flat(upper.variables)
    assert (first - second) * (1 if isinstance(method, LayerScales) else -1) > 2
