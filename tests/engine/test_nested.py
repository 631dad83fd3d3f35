"""Chains of three levels and more, against closed forms and against autograd."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hyperopt_peft import Engine, Nested, compare_hypergradients, hypergradient
from hyperopt_peft.engine import fit, minimize
from hyperopt_peft.hypergradients import ConjugateGradient
from tests.support.chains import chain, nested
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel


def relative_error(found: Any, expected: Any) -> Any:
    return float((found - expected).norm() / expected.norm())


# On a quadratic a difference of gradients is exact at any step length.
OUTER = {
    "exact": "exact:product=difference,epsilon=1.0",
    "cg": "cg:product=difference,epsilon=1.0,steps=30,tolerance=1e-14",
    "minres": "minres:product=difference,epsilon=1.0,steps=30,tolerance=1e-14",
}


@pytest.mark.parametrize("method", ["exact", "cg", "minres"])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_three_levels_have_the_closed_form(seed: Any, settled: bool, method: str) -> None:
    """At any point: implicit differentiation takes each level for settled where it is."""
    program = chain(3, seed)
    if settled:
        program.settle()
    (found,) = hypergradient(*nested(program.levels()), OUTER[method])
    assert relative_error(found, program.hypergradient()) < 1e-12


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("cg:steps=30,tolerance=1e-14", OUTER["cg"]),
        ("minres:steps=30,tolerance=1e-14,product=difference,epsilon=1.0", OUTER["exact"]),
        ("neumann:terms=50", OUTER["exact"]),
        ("exact:product=difference,epsilon=1.0", "neumann:product=difference,epsilon=1.0,terms=50"),
    ],
)
def test_any_solver_will_do_at_either_place(inner: str, outer: Any) -> None:
    program = chain(3, sizes=(2, 2, 3), ridge=10.0)
    (found,) = hypergradient(*nested(program.levels(), inner), outer)
    assert relative_error(found, program.hypergradient()) < 1e-10


def test_four_levels_have_the_closed_form() -> None:
    program = chain(4)
    (found,) = hypergradient(*nested(program.levels()), OUTER["cg"])
    assert relative_error(found, program.hypergradient()) < 1e-12


def test_the_length_of_a_difference_grows_with_the_chain() -> None:
    """Differences of differences: one length for all would be 80 times worse."""
    program = chain(4, sizes=(1, 2, 1, 2))
    method = "exact:product=difference"
    (found,) = hypergradient(*nested(program.levels(), above=method), method)
    assert relative_error(found, program.hypergradient()) < 1e-7


def test_any_length_works_by_default() -> None:
    program = chain(5, sizes=(1, 1, 1, 1, 1))
    first, second, third, fourth, fifth = program.levels()
    level = Nested(second, Nested(third, Nested(fourth, fifth)))
    options = ConjugateGradient(steps=20, tolerance=1e-12)
    assert level.lower.lower.estimator == options
    assert level.estimator == level.lower.estimator == replace(options, product="difference")
    (found,) = hypergradient(first, level, "cg:product=difference")
    assert relative_error(found, program.hypergradient()) < 1e-5


def test_default_options_are_good_to_ten_digits() -> None:
    program = chain(3)
    top, middle, lower = program.levels()
    (found,) = hypergradient(top, Nested(middle, lower), "cg:product=difference,tolerance=1e-12")
    assert relative_error(found, program.hypergradient()) < 1e-10


def newton(objective: Any, x: Tensor, steps: int = 1) -> Any:
    """x after Newton steps that autograd can differentiate; one step minimises a quadratic."""
    for _ in range(steps):
        (g,) = torch.autograd.grad(objective(x), x, create_graph=True)
        rows = [torch.autograd.grad(part, x, create_graph=True)[0] for part in g]
        x = x - torch.linalg.solve(torch.stack(rows), g)
    return x


def test_it_is_the_derivative_of_the_nested_minima() -> None:
    """Autograd through argmin f, and through argmin of G over it, knows no implicit formula."""
    program = chain(3)
    program.settle()
    (found,) = hypergradient(*nested(program.levels()), OUTER["exact"])
    u, v, w = (x.detach().clone().requires_grad_() for x in program.blocks)

    def lowest(u: Any, v: Any) -> Any:
        return newton(lambda w: program.objective(2, (u, v, w)), w)

    best = newton(lambda v: program.objective(1, (u, v, lowest(u, v))), v)
    (expected,) = torch.autograd.grad(program.objective(0, (u, best, lowest(u, best))), u)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_the_total_one() -> None:
    program = chain(3)
    program.settle()
    _, middle = nested(program.levels())
    u, v, w = (x.detach().clone().requires_grad_() for x in program.blocks)
    lowest = newton(lambda w: program.objective(2, (u, v, w)), w)
    expected = torch.autograd.grad(program.objective(1, (u, v, lowest)), (v, u))
    found = middle.gradient(None, (program.blocks[1], program.blocks[0]))
    torch.testing.assert_close(found.gradient, expected, rtol=1e-10, atol=1e-12)
    assert found.loss == middle.loss(None).item() == program.objective(1, program.blocks).item()


def logistic() -> tuple[Any, ...]:
    """Weights, a penalty for each, and a prior of the penalties, on three sets of points."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    sets = []
    for size in (60, 30, 40):
        x = torch.randn(size, 8, **options)
        sets.append((x, (x[:, :3].sum(1) + torch.randn(size, **options)).sign()))
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    v = torch.full((8,), -2.0, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(8, dtype=torch.float64, requires_grad=True)

    def error(w: Any, index: Any) -> Any:
        x, y = sets[index]
        return softplus(-y * (x @ w)).mean()

    def f(w: Any, v: Any) -> Any:
        return error(w, 0) + v.exp() @ w.square() / 2

    def g(w: Any, v: Any, u: Any) -> Any:
        return error(w, 1) + u[0].exp() * (v - u[1]).square().mean() / 2

    levels = (
        FunctionLevel(lambda _: error(w, 2), [u]),
        FunctionLevel(lambda _: g(w, v, u), [v]),
        FunctionLevel(lambda _: f(w, v), [w]),
    )
    minimize(levels[2], tolerance=1e-11)

    def lowest(v: Any) -> Any:
        return newton(lambda w: f(w, v), w, steps=2)

    # The formula of two levels on the reduced objectives, whose derivatives autograd takes.
    (gradient,) = torch.autograd.grad(g(lowest(v), v, u), v, create_graph=True)
    rows = [torch.autograd.grad(part, v, retain_graph=True)[0] for part in gradient]
    (b,) = torch.autograd.grad(error(lowest(v), 2), v)
    solution = torch.linalg.solve(torch.stack(rows), b)
    (expected,) = torch.autograd.grad(gradient, u, -solution)
    return levels, expected


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [({}, 0, 1e-7), ({"follow": 2}, 0, 1e-7), ({"follow": 0}, 0.1, 0.5)],
)
def test_without_following_the_second_derivatives_are_wrong(
    options: dict[str, Any], least: float, most: float
) -> None:
    """Where no level is quadratic: one Newton step will do, and none is off by a fifth."""
    (top, middle, lower), expected = logistic()
    level = Nested(middle, lower, **options)
    (found,) = hypergradient(top, level, "exact:product=difference")
    assert least <= relative_error(found, expected) < most


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_darts_takes_the_identity_for_the_inverse(scheme: str) -> None:
    """In training, from the start of the level's last step, with that step's own gradient."""
    program = chain(3, seed=1)
    u = program.blocks[0].detach().clone()
    method = f"darts:xi=0.5,epsilon=1.0,scheme={scheme}"
    engine = Engine(*nested(program.levels(lr=1e-2)), method, progress=False)
    engine.run(1)
    found = (u - program.blocks[0].detach()) / 1e-2
    with torch.no_grad():
        program.blocks[0].copy_(u)
        below, middle = program.matrices[2], program.matrices[1]
        n, k = len(below) - len(program.blocks[2]), len(u)
        slope = -torch.linalg.solve(below[n:, n:], below[n:, :n])
        basis = torch.cat([torch.eye(n, dtype=torch.float64), slope])
        reduced = basis.T @ middle @ basis
        top = basis.T @ (program.matrices[0] @ torch.cat(program.blocks) + program.vectors[0])
        expected = top[:k] - 0.5 * reduced[:k, k:] @ top[k:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [3, 4])
def test_training_reaches_the_optimum_of_the_chain(length: int) -> None:
    program = chain(length, sizes={3: (2, 2, 3), 4: (1, 1, 1, 1)}[length], ridge=10.0)
    method = "cg:product=difference,epsilon=1.0"
    top, lower = nested(program.levels(lr=0.06), "cg", method, lower_steps=2)
    engine = Engine(top, lower, method, lower_steps=2, progress=False)
    engine.run(20)
    for x, best in zip(program.blocks, program.optimum(), strict=True):
        torch.testing.assert_close(x.detach(), best, rtol=0, atol=1e-6)
    record = engine.history[-1]
    assert record["upper_grad_norm"] < 1e-5
    assert record["lower_below_grad_norm"] < 1e-5
    assert record["lower_residual"] < 1e-5
    assert record["lower_loss"] == pytest.approx(program.objective(1, program.blocks).item())


def test_a_level_comes_after_the_steps_of_the_one_below() -> None:
    log = []
    program = chain(4, sizes=(1, 1, 1, 1))
    for k, level in enumerate(levels := program.levels()):
        inner = level.step
        level.step = lambda *given, k=k, inner=inner: (log.append(k), inner(*given))[1]
    first, second, third, fourth = levels
    lower = Nested(third, fourth, lower_steps=2, warmup_steps=3)
    lower = Nested(second, lower, "cg:product=difference")
    Engine(first, lower, "cg:product=difference", lower_steps=2, progress=False).run(2)
    inner = [3, 3, 2, 1]
    assert log == [3, 3, 3, *inner, *inner, 0, *inner, *inner, 0]
    log.clear()
    fit(lower, 2, progress=False)
    assert log == [*inner, *inner]


def test_estimators_can_be_compared_on_a_chain() -> None:
    levels = nested(chain(3).levels())
    methods = ["cg:product=difference", "cg", "darts", "direct"]
    table = compare_hypergradients(*levels, methods, OUTER["exact"], repeats=1)
    cg, refused, darts, direct = table.records()
    assert cg["relative_error"] < 1e-4 < direct["relative_error"]
    assert 'product="difference"' in refused["problem"]
    assert 0 < darts["cosine"] < 1


def test_half_precision_is_displaced_in_single_precision() -> None:
    """All levels: eight bits would leave nothing of w's following, nor of a difference."""
    program = chain(3, sizes=(2, 2, 3))
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        blocks = [x.detach().bfloat16().to(dtype).requires_grad_() for x in program.blocks]
        matrices = [m.bfloat16().to(dtype) for m in program.matrices]
        vectors = [a.bfloat16().to(dtype) for a in program.vectors]
        copy = type(program)(matrices, vectors, blocks)
        before = [x.detach().clone() for x in blocks]
        top, lower = nested(copy.levels(), "cg")
        (found[dtype],) = hypergradient(top, lower, "cg:product=difference")
        assert not differences(before, [x.detach() for x in blocks])
    assert relative_error(found[torch.bfloat16].double(), found[torch.float64]) < 0.02
