"""The roots of trust: differences of the value function, and figures known from elsewhere.

The value function is u ↦ F(w*(u), u). It is evaluated here without any code of the estimators:
Newton's method finds w*(u), and its fourth-order central difference is the hypergradient.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hyperopt_peft import Engine, Problem, hypergradient
from hyperopt_peft.engine import fit
from hyperopt_peft.problems.textbook import hypercleaning, logistic
from tests.support.differences import displace, gradient
from tests.support.newton import minimise
from tests.support.quadratic import flat, relative_error


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
        ("f2sa:tolerance=1e-5", 3e-5, 1e-3),
        ("penalty", 0.006, 0.03),
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
    """And the images whose labels were redrawn are those whose weights fall below ½.

    One in ten of the redrawn labels is right by chance, so the F1 score cannot reach 1.
    """
    upper, lower = hypercleaning.digits()
    Engine(upper, lower, method, lower_steps=2, warmup_steps=60, progress=False).run(60)
    assert upper.test_accuracy() >= 0.915
    light, redrawn = upper.variables[0] < 0, lower.data.redrawn
    f1 = 2 * (light & redrawn).sum() / (light.sum() + redrawn.sum())
    assert f1 > 0.88
