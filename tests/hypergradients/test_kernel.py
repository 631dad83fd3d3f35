"""The kernel against central differences of F(u, w*(u)), and the estimators against the kernel."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft import hypergradient
from hyperopt_peft.hypergradients import registered
from hyperopt_peft.hypergradients.kernel import Tensors, implicit_gradient
from tests.support.differences import gradient
from tests.support.newton import minimise
from tests.support.quadratic import FunctionLevel, flat

#: But for "warm", whose v is that of earlier upper steps.
SOLVERS = [n for n, entry in registered().items() if entry.kind == "implicit" and n != "warm"]
#: Options with which each solver reaches rounding on ten unknowns.
OPTIONS = {"neumann": ":terms=5000", "nystrom": ":steps=100"}


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x, y = torch.randn(2, 30, 5, dtype=torch.float64), torch.randint(2, (2, 30))
    return x[0], y[0], x[1], y[1]


def losses(seed: int):
    """A weight for each class and a decay for each feature; F reads the former too."""
    x, y, x_val, y_val = problem(seed)

    def f(u: Tensors, w: Tensors) -> Tensor:
        rows = cross_entropy(x @ w[0], y, reduction="none") * u[0].exp()[y]
        return rows.mean() + (u[1].exp() @ w[0].square()).sum()

    def upper(u: Tensors, w: Tensors) -> Tensor:
        return cross_entropy(x_val @ w[0], y_val) + 0.01 * u[0].square().sum()

    return upper, f


def minimum(f, u: Tensors) -> list[Tensor]:
    """w*(u)."""
    w = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    minimise(FunctionLevel(lambda _: f(u, [w]), [w]))
    return [w.detach()]


def start(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [0.1 * torch.randn(2, dtype=torch.float64), torch.randn(5, dtype=torch.float64) - 3]


def test_it_is_the_derivative_of_the_upper_loss_at_the_lower_minimum() -> None:
    upper, f = losses(1)
    u = start(1)

    def value(shift: Tensor) -> Tensor:
        moved = [x + part for x, part in zip(u, shift.split([2, 5]), strict=True)]
        return upper(moved, minimum(f, moved))

    actual = flat(implicit_gradient(upper, f, u, minimum(f, u)))
    torch.testing.assert_close(actual, gradient(value, 7), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_agree_with_it(name: str) -> None:
    upper_loss, f = losses(0)
    u = [x.requires_grad_() for x in start(0)]
    w = [x.requires_grad_() for x in minimum(f, [x.detach() for x in u])]
    upper = FunctionLevel(lambda _: upper_loss(u, w), u)
    lower = FunctionLevel(lambda _: f(u, w), w)
    options = OPTIONS.get(name, "" if name == "exact" else ":steps=100,tolerance=1e-12")
    for part, truth in zip(
        hypergradient(upper, lower, f"{name}{options}"), implicit_gradient(upper_loss, f, u, w)
    ):
        assert torch.allclose(part, truth, rtol=1e-6, atol=1e-9)
