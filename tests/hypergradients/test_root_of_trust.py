"""The roots of trust: central differences of u ↦ F(w*(u), u), the kernel, and known figures."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hyperopt_peft import Engine, Problem, hypergradient
from hyperopt_peft.engine import fit
from hyperopt_peft.hypergradients import registered
from hyperopt_peft.hypergradients.kernel import Tensors, implicit_gradient
from hyperopt_peft.problems.textbook import hypercleaning, logistic
from tests.support.differences import displace, gradient
from tests.support.newton import minimise
from tests.support.quadratic import FunctionLevel, flat, relative_error


def value_slopes(
    upper: Problem, solve: Callable[[], object], entries: list[int] | None = None
) -> Tensor:
    """dF(w*(u), u)/du, where ``solve`` moves w to w*(u)."""
    start = flat(upper.variables).detach().clone()

    def value(shift: Tensor) -> float:
        displace(upper.variables, shift)
        solve()
        loss = upper.evaluate(None)[0].item()
        displace(upper.variables, start - flat(upper.variables).detach())
        return loss

    result = gradient(value, len(start), step=3e-3, entries=entries)
    solve()
    return result


@pytest.fixture(scope="module")
def cleaning() -> tuple[Problem, Problem, Tensor]:
    """Problem B at the lower optimum for x = 0, and the lower Hessian there."""
    upper, lower = hypercleaning.digits()
    fit(lower, 300, progress=False)
    return upper, lower, minimise(lower)


@pytest.fixture
def cancer() -> tuple[Problem, Problem]:
    """Problem A at the lower optimum for l = −2."""
    upper, lower = logistic.breast_cancer()
    minimise(lower)
    return upper, lower


def test_exact_is_the_slope_of_the_value_function(cancer: tuple[Problem, Problem]) -> None:
    upper, lower = cancer
    assert upper.evaluate(None)[0].item() == pytest.approx(0.164355, abs=5e-7)
    (h,) = hypergradient(upper, lower, "exact")
    assert h.norm().item() == pytest.approx(0.014535140, abs=5e-10)
    slopes = value_slopes(upper, lambda: minimise(lower))
    torch.testing.assert_close(h, slopes, rtol=0, atol=1e-9 * float(h.norm()) + 1e-12)


def test_exact_is_the_slope_on_hypercleaning(cleaning: tuple[Problem, Problem, Tensor]) -> None:
    upper, lower, hessian = cleaning
    (h,) = hypergradient(upper, lower, "exact")
    coordinates = [*h.abs().topk(2).indices.tolist(), 0, 799]
    slopes = value_slopes(upper, lambda: minimise(lower, hessian), coordinates)
    torch.testing.assert_close(h[coordinates], slopes, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "on_cancer", "on_digits"),
    [
        ("neumann:terms=20", 0.009, 0.024),
        ("cg:steps=10", 1e-6, 0.003),
        ("minres:steps=10", 1e-6, 0.0025),
        ("nystrom:rank=10,steps=10", 1e-5, 0.0025),
        ("unrolled:steps=10", 0.06, None),
        ("f2sa:multiplier=1000.0", 0.005, 0.01),
    ],
)
def test_errors_are_no_larger_than_measured_elsewhere(
    cancer: tuple[Problem, Problem],
    cleaning: tuple[Problem, Problem, Tensor],
    method: str,
    on_cancer: float,
    on_digits: float | None,
) -> None:
    for (upper, lower), limit in ((cancer, on_cancer), (cleaning[:2], on_digits)):
        if limit is not None:
            actual, exact = (hypergradient(upper, lower, m) for m in (method, "exact"))
            assert relative_error(actual, exact) <= limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["cg:product=difference", "neumann:terms=10", "f2sa:inner_steps=3"]
)
def test_cleaning_improves_the_test_accuracy(method: str) -> None:
    """And the images whose labels were redrawn are those whose weights fall below ½."""
    upper, lower = hypercleaning.digits()
    Engine(upper, lower, method, lower_steps=2, warmup_steps=60, progress=False).run(60)
    assert upper.test_accuracy() >= 0.915
    light, redrawn = upper.variables[0] < 0, lower.data.redrawn
    f1 = 2 * (light & redrawn).sum() / (light.sum() + redrawn.sum())
    assert f1 > 0.88  # one in ten of the redrawn labels is right by chance


#: But for "warm", whose v is that of earlier upper steps.
SOLVERS = [n for n, entry in registered().items() if entry.kind == "implicit" and n != "warm"]
#: Options with which each solver reaches rounding on ten unknowns.
OPTIONS = {"neumann": ":terms=5000", "nystrom": ":steps=100"}


def losses(seed: int):
    """A weight for each class and a decay for each feature; F reads the former too."""
    torch.manual_seed(seed)
    (x, x_val), (y, y_val) = torch.randn(2, 30, 5).double(), torch.randint(2, (2, 30))

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
