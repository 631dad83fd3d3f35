"""Levels of an adapted linear layer, whose lower one is at a minimum."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from hyperopt_peft import Method
from hyperopt_peft.engine import lbfgs
from tests.support.adapted_models import layer_input, randomise, single

SGD = partial(torch.optim.SGD, lr=0.1)


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


@torch.no_grad()
def assign(level: Any, values: Tensor) -> None:
    parts = values.split([x.numel() for x in level.variables])
    for variable, part in zip(level.variables, parts, strict=True):
        variable.copy_(part.view_as(variable))


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
