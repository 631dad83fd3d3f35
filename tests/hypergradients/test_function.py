"""A function (matvec, b) -> v in the place of an estimator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from hyperopt_peft import Engine, ProblemError, compare_hypergradients, hypergradient
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients import ConjugateGradient
from hyperopt_peft.hypergradients.implicit.function import FunctionSolver
from tests.support.quadratic import FunctionLevel, flat, program

Product = Callable[[Tensor], Tensor]


@torch.no_grad()
def my_cg(matvec: Product, b: Tensor, steps: int = 12) -> Tensor:
    """Conjugate gradients, without a graph as most people write them."""
    v, r = torch.zeros_like(b), b
    p = r
    for _ in range(steps):
        q = matvec(p)
        alpha = (r @ r) / (p @ q)
        v, rest = v + alpha * p, r - alpha * q
        p, r = rest + (rest @ rest) / (r @ r) * p, rest
    return v


def of_scipy(matvec: Product, b: Tensor) -> Tensor:
    h = LinearOperator(
        (len(b), len(b)), lambda v: matvec(torch.tensor(v)).numpy(), dtype=np.float64
    )
    return torch.from_numpy(cg(h, b.numpy(), rtol=1e-12)[0])


@pytest.mark.parametrize("function", [my_cg, of_scipy])
@pytest.mark.parametrize("product", ["exact", "difference"])
def test_a_function_solves_like_cg_and_the_dense_solver(function: Any, product: Any) -> None:
    levels = program(0).levels()
    expected = flat(hypergradient(*levels, "exact"))
    krylov = flat(hypergradient(*levels, "cg:steps=12,tolerance=0"))
    actual = flat(hypergradient(*levels, FunctionSolver(function, product=product)))
    tolerance = 1e-9 if product == "exact" else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(krylov, expected, rtol=1e-9, atol=1e-9)
    if product == "exact":
        assert torch.equal(actual, flat(hypergradient(*levels, function)))


def test_a_function_goes_wherever_an_estimator_goes() -> None:
    runs = []
    for solver in (my_cg, "cg:steps=12,tolerance=0"):
        upper, lower = program(0).levels()
        records = Engine(upper, lower, hypergradient=solver, progress=False).run(2)
        assert records[-1]["products"] == 12 + 1
        runs.append(flat(upper.variables).detach())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)
    levels = program(0).levels()
    table = compare_hypergradients(*levels, [my_cg, lambda matvec, b: b, "cg"], repeats=1)
    close, far, _ = table.rows
    assert close.relative_error < 1e-9 < far.relative_error
    assert (close.estimator, far.estimator) == ("my_cg(matvec, b)", "<lambda>(matvec, b)")
    assert compare_hypergradients(*levels, my_cg, repeats=1).rows[0].relative_error < 1e-9
    assert repr(FunctionSolver(my_cg, product="difference")).endswith("product='difference')")


def test_mixed_dtypes_are_one_tensor_and_b_belongs_to_the_function() -> None:
    w = [torch.ones(2, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float64)]
    u = torch.ones(2, dtype=torch.float64, requires_grad=True)
    upper = FunctionLevel(lambda _: w[0].square().sum() + w[1].sum(), [u])
    lower = FunctionLevel(lambda _: sum((x - u).square().sum() for x in w), w)

    def newton(matvec: Product, b: Tensor) -> Tensor:
        assert b.dtype == torch.float64 and matvec(b).dtype == torch.float64
        return b.mul_(0.5)

    (actual,) = hypergradient(upper, lower, newton)
    torch.testing.assert_close(actual, hypergradient(upper, lower, "exact")[0])


def nan(matvec: Product, b: Tensor) -> Tensor:
    return torch.nan * b


@pytest.mark.parametrize(
    ("solver", "error", "fragment"),
    [
        (lambda matvec, b: b[:-1], ProblemError, r"must return .*\(12,\).*\(11,\)"),
        (lambda matvec, b: b.numpy(), ProblemError, "must return .*ndarray"),
        (lambda matvec, b: matvec(b[:3]), ProblemError, r"matvec takes .*\(3,\)"),
        (nan, NonFiniteError, "^nan: .*NaN or infinite"),
        (ConjugateGradient, ProblemError, "the class ConjugateGradient.*instance"),
        (3, ProblemError, "Estimator.*int"),
    ],
)
def test_mistakes_are_named(solver: Any, error: type[Exception], fragment: str) -> None:
    with pytest.raises(error, match=fragment):
        hypergradient(*program(0).levels(), solver)
