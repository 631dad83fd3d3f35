"""check_problem compares derivatives with differences: it names wrong ones, and passes kinks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperopt_peft import check_problem
from tests.support.networks import network_levels
from tests.support.quadratic import FunctionLevel, Once


class Cube(torch.autograd.Function):
    """x³ with a right first derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * slope


class ReadsContext(Cube):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * ctx.x**2 * slope


class WithoutGraph(Cube):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        with torch.no_grad():
            return Cube.backward(ctx, slope)


class WrongFactor(Cube):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * slope


def levels(
    activation: Callable[[Tensor], Tensor] = torch.tanh,
    dtype: torch.dtype = torch.float32,
    normalise: Callable[[nn.Module], nn.Module] = lambda layer: layer,
) -> tuple[FunctionLevel, FunctionLevel]:
    """Rows with weights exp(u), and a network of two layers."""
    torch.manual_seed(0)
    net = nn.ModuleList([normalise(nn.Linear(6, 16)), normalise(nn.Linear(16, 3))]).to(dtype)
    logits = lambda: net[1](activation(net[0](x)))  # noqa: E731
    x, y = torch.randn(50, 6).to(dtype), torch.randint(0, 3, (50,))
    u = torch.zeros(50, dtype=dtype, requires_grad=True)
    f = lambda _: (cross_entropy(logits(), y, reduction="none") * u.exp()).mean()  # noqa: E731
    above = FunctionLevel(lambda _: cross_entropy(logits(), y), [("u", u)], name="above")
    return above, FunctionLevel(f, net.named_parameters(), name="below")


WRONG = ("wrong gradient", "wrong second derivative")


def wrong(upper: FunctionLevel, lower: FunctionLevel) -> list[tuple[str, str, str]]:
    check = check_problem(upper, lower, solver_steps=2, progress=False)
    assert not check.not_compared
    return [(f.kind, f.level, f.severity) for f in check.findings if f.kind in WRONG]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [ReadsContext, WithoutGraph])
def test_a_wrong_double_backward_is_an_error(function: type[Cube], dtype: torch.dtype) -> None:
    assert wrong(*levels(function.apply, dtype)) == [(WRONG[1], "below", "error")]
    assert wrong(*levels(Cube.apply, dtype)) == []
    truth = check_problem(*levels(Cube.apply, torch.float64), progress=False).curvature
    check = check_problem(*levels(function.apply, torch.float64), progress=False)
    assert check.curvature is not None and truth is not None
    assert check.curvature.largest == pytest.approx(truth.largest, rel=1e-5)
    assert 'product="difference"' in str(check)


def test_weight_norm_is_found_where_its_double_backward_is_wrong() -> None:
    upper, lower = levels(normalise=nn.utils.parametrizations.weight_norm)
    v, g = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (4, 1))
    right = torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False
    )
    assert wrong(upper, lower) == ([] if right else [(WRONG[1], "below", "error")])


def test_a_gradient_that_is_not_that_of_the_loss() -> None:
    found = [(WRONG[0], "above", "warning"), (WRONG[0], "below", "warning")]
    assert wrong(*levels(WrongFactor.apply)) == found
    assert wrong(*levels(lambda x: x * x.detach())) == found


@pytest.mark.parametrize("factor", [3.0, 0.0])
def test_a_hook_that_scales_a_gradient(factor: float) -> None:
    upper, lower = levels()
    lower.variables[0].register_hook(lambda slope: factor * slope)
    assert (WRONG[0], "below", "warning") in wrong(upper, lower)
    upper, lower = levels()
    upper.variables[0].register_hook(lambda slope: (1 + factor) * slope)
    assert ((WRONG[0], "below", "warning") in wrong(upper, lower)) is (factor > 0)


def test_a_hook_that_masks_a_gradient_is_right_for_what_it_lets_through() -> None:
    upper, lower = levels()
    rows = (torch.arange(16) % 2)[:, None].float()
    lower.variables[0].register_hook(lambda slope: rows * slope)
    assert wrong(upper, lower) == []


def kinked(x: Tensor) -> Tensor:
    return x.relu() + x.clamp(-0.5, 0.5) + (x - 1).abs() + x.round().detach() * 0


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_kinks_and_half_precision_are_no_finding(dtype: torch.dtype, autocast: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert wrong(*levels(kinked, dtype)) == []


def test_dropout_and_batch_normalisation_are_no_finding() -> None:
    upper, lower = network_levels()
    buffers = {name: buffer.clone() for name, buffer in upper.net.named_buffers()}
    check = check_problem(upper, lower, solver_steps=2, progress=False)
    assert all(torch.equal(buffers[name], b) for name, b in upper.net.named_buffers())
    assert not check.not_compared and not {f.kind for f in check.findings} & set(WRONG)


POINTS = {
    "at a kink": lambda w, u: torch.relu(w - u).sum() + w.square().sum(),
    "a norm at zero": lambda w, u: (w - u).norm() + w.square().sum(),
    "tied maxima": lambda w, u: (w - u).max() + w.square().sum(),
    "linear": lambda w, u: (3 * w + 2 * u).sum(),
    "once": lambda w, u: Once.apply(w - u).sum(),
    "dense": lambda w, u: (torch.linspace(-1, 1, 10_000)[:, None] - w + u).relu().mean(),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_points_without_a_derivative_are_no_finding(point: str, start: float) -> None:
    u, w = torch.zeros(5, requires_grad=True), torch.full((5,), start, requires_grad=True)
    upper = FunctionLevel(lambda _: (w - 1).square().sum(), [u])
    lower = FunctionLevel(lambda _: POINTS[point](w, u), [w])
    assert wrong(upper, lower) == []


def test_a_loss_that_float64_breaks_is_not_compared_and_the_check_says_so() -> None:
    def single_only(x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("float32 only")
        return x.tanh()

    check = check_problem(*levels(single_only), solver_steps=2, progress=False)
    assert "float32 only" in check.not_compared and check.not_compared in str(check)
    assert check.curvature is not None
