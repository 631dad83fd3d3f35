"""Estimators by name, of the user, and from a function (matvec, b) -> v."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from hyperopt_peft import (
    Engine,
    Estimator,
    ProblemError,
    Solver,
    compare_hypergradients,
    hypergradient,
    register,
)
from hyperopt_peft.errors import NonFiniteError
from hyperopt_peft.hypergradients import (
    DARTS,
    MINRES,
    ConjugateGradient,
    Direct,
    Matvec,
    Neumann,
    Solution,
    Vector,
    get_estimator,
    registered,
    registry,
    zeros_like,
)
from hyperopt_peft.hypergradients.contrib import F2SA
from hyperopt_peft.hypergradients.implicit.function import FunctionSolver
from hyperopt_peft.utils.validation import matches
from tests.support.quadratic import FunctionLevel, flat, program


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_ENTRIES", registered())


@pytest.mark.parametrize(
    ("method", "estimator"),
    [
        ("direct", Direct()),
        ("cg", ConjugateGradient()),
        ("cg:", ConjugateGradient()),
        ("cg:steps=40,damping=0.1", ConjugateGradient(steps=40, damping=0.1)),
        (" steps = 3 ".join(["minres:", ""]), MINRES(steps=3)),
        ("cg:tolerance=1e-8", ConjugateGradient(tolerance=1e-8)),
        (
            "cg:product=difference,epsilon=.01",
            ConjugateGradient(product="difference", epsilon=0.01),
        ),
        ("neumann:terms=20,step_size=none", Neumann(terms=20)),
        ("f2sa:inner_steps=3", F2SA(inner_steps=3)),
        ("darts:xi=lr,scheme=forward", DARTS(xi="lr", scheme="forward")),
        ("darts:xi='lr'", DARTS(xi="lr")),
        (MINRES(steps=2), MINRES(steps=2)),
    ],
)
def test_specifications_name_an_estimator_with_options(method: Any, estimator: Estimator) -> None:
    actual = get_estimator(method)
    assert actual == estimator and type(actual) is type(estimator)


@pytest.mark.parametrize("name", registered())
def test_an_estimator_knows_its_name_and_its_repr_builds_it_again(name: str) -> None:
    estimator = get_estimator(name)
    assert estimator.name == name
    names = {entry.estimator.__name__: entry.estimator for entry in registered().values()}
    assert eval(repr(estimator), names) == estimator


MISTAKES = {
    "cgg": "'cgg'.*'cg'",
    "neuman:terms=3": "'neuman'.*'neumann'",
    "xyzzy": "'xyzzy'.*cg, darts, direct",
    "cg:step=4": "cg: .*'step'.*'steps'",
    "cg:40": "cg: .*'40'",
    "cg:steps=0": "cg: steps .* 0",
    "cg:steps=2.5": "cg: steps .*2.5",
    "cg:steps=True": "cg: steps .*True",
    "cg:damping=high": "cg: damping .*'high'",
    "cg:product=finite": "cg: product .*'exact' or 'difference'.*'finite'",
    "minres:tolerance=1": "minres: tolerance .* 1",
    "warm:decay=1.5": "warm: decay .*1.5",
    "darts:xi=rl": "darts: xi .*'lr'.*'rl'",
    "darts:scheme=3": "darts: scheme .*'central'.*'forward'",
    "sama:epsilon=0": "sama: epsilon ",
    "f2sa:tolerance=1": "f2sa: tolerance .* 1",
}


@pytest.mark.parametrize("estimator", MISTAKES)
def test_mistakes_are_named(estimator: str) -> None:
    with pytest.raises(ProblemError, match=MISTAKES[estimator]):
        get_estimator(estimator)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: DARTS(epsilon=0.0), "darts: epsilon "),
        (lambda: DARTS(xi=float("nan")), "darts: xi "),
        (lambda: register("cg", kind="direct")(Direct), "cg: .*registered"),
        (lambda: register("new", kind="best")(Direct), "new: kind .*'implicit'.*'best'"),
        (lambda: register("new", kind="implicit")(Direct), "new: .*tolerance"),
        (lambda: register("new", kind="penalty")(Direct), "new: .*tolerance"),
    ],
)
def test_mistakes_in_a_class_are_named(construct: Callable[[], object], message: str) -> None:
    before = registered()
    with pytest.raises(ProblemError, match=message):
        construct()
    assert registered() == before


@pytest.mark.parametrize("name", registered())
def test_no_option_takes_a_negative_number(name: str) -> None:
    hints = get_type_hints(registered()[name].estimator)
    fields = {field.name for field in dataclasses.fields(get_estimator(name))}
    for option in sorted(option for option in fields if matches(-1, hints[option])):
        with pytest.raises(ProblemError, match=f"{name}: {option} "):
            get_estimator(f"{name}:{option}=-1")


def test_a_solver_of_the_user_is_a_few_lines() -> None:
    @register("richardson", kind="implicit", tolerance=1e-3)
    @dataclass(frozen=True)
    class Richardson(Solver):
        steps: int = 200
        rate: float = 0.1

        def solve(self, matvec: Matvec, b: Vector) -> Solution:
            v = zeros_like(b)
            for _ in range(self.steps):
                v = v + self.rate * (b - matvec(v))
            return Solution(v, steps=self.steps)

    quadratic = program(0)
    levels = quadratic.levels()
    exact = flat(hypergradient(*levels, "exact"))
    for method in ("richardson", "richardson:steps=300,product=difference", Richardson()):
        error = flat(hypergradient(*levels, method)) - exact
        assert error.norm() < 1e-3 * exact.norm()
    assert Engine(*levels, "richardson:steps=20", progress=False).run(1)[0]["solver_steps"] == 20
    with pytest.raises(ProblemError, match=r"richardson: .*'rates'.*'rate'"):
        get_estimator("richardson:rates=1")


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
def test_bad_functions_are_named(solver: Any, error: type[Exception], fragment: str) -> None:
    with pytest.raises(error, match=fragment):
        hypergradient(*program(0).levels(), solver)
