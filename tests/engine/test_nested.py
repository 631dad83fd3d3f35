"""Three levels and more: closed forms, autograd, purity, random numbers, and what is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from hyperopt_peft import Engine, Nested, NonFiniteError, ProblemError, hypergradient
from hyperopt_peft.engine import fit, minimize
from hyperopt_peft.trainer.checks import check_levels
from tests.support.chains import chain, nested
from tests.support.networks import (
    Interruption,
    differences,
    give_gradients,
    interrupt,
    network_levels,
    snapshot,
)
from tests.support.quadratic import FunctionLevel, leaf, relative_error

# On a quadratic a difference of gradients is exact at any step length.
EXACT = "exact:product=difference,epsilon=1.0"
CG = "cg:product=difference,epsilon=1.0,steps=30,tolerance=1e-14"
MINRES = "minres:product=difference,epsilon=1.0,steps=30,tolerance=1e-14"
NEUMANN = "neumann:product=difference,epsilon=1.0,terms=50"
SMALL = {"sizes": (2, 2, 3), "ridge": 10.0}
SHORT = {"sizes": (1, 2, 1, 2)}


@pytest.mark.parametrize(
    ("count", "options", "inner", "outer", "error"),
    [
        (3, {}, "exact", EXACT, 1e-12),
        (3, SMALL, "cg:steps=30,tolerance=1e-14", CG, 1e-10),
        (3, SMALL, MINRES, MINRES, 1e-10),
        (3, SMALL, "neumann:terms=50", EXACT, 1e-10),
        (3, SMALL, EXACT, NEUMANN, 1e-10),
        (4, {}, "exact", CG, 1e-12),
        # Differences of differences: one length for all would be 80 times worse.
        (4, SHORT, "exact", "exact:product=difference", 1e-7),
    ],
)
def test_the_closed_form(count: int, options: Any, inner: str, outer: str, error: float) -> None:
    """At any point: implicit differentiation treats a level's values as its minimum."""
    program = chain(count, **options)
    above = outer if options is SHORT else EXACT
    (found,) = hypergradient(*nested(program.levels(), inner, above), outer)
    assert relative_error(found, program.hypergradient()) < error


def newton(objective: Any, x: Tensor, steps: int = 1) -> Any:
    """x after Newton steps that autograd can differentiate; one step minimises a quadratic."""
    for _ in range(steps):
        (g,) = torch.autograd.grad(objective(x), x, create_graph=True)
        rows = [torch.autograd.grad(part, x, create_graph=True)[0] for part in g]
        x = x - torch.linalg.solve(torch.stack(rows), g)
    return x


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


def test_where_no_level_is_quadratic_one_newton_step_will_do() -> None:
    (top, middle, lower), expected = logistic()
    (found,) = hypergradient(top, Nested(middle, lower), "exact:product=difference")
    assert relative_error(found, expected) < 1e-7


def test_training_reaches_the_optimum_of_the_chain() -> None:
    program = chain(3, **SMALL)
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


METHODS = ["darts", "cg:product=difference,steps=3", "unrolled:product=difference"]


def network_engine(method: str, **options: Any) -> Engine:
    top, middle, lower = network_levels(3, **options)
    level = Nested(middle, lower, "cg:steps=3", lower_steps=2, warmup_steps=1)
    return Engine(top, level, method, lower_steps=2, progress=False)


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_hypergradient_leaves_no_trace(method: str) -> None:
    """Also not one that fails in any of its evaluations, nor in the batches to come."""
    engine, twin = network_engine(method), network_engine(method)
    for run in (engine, twin):
        torch.manual_seed(1)
        run.run(2)
    levels = (engine.upper, engine.lower.middle, engine.lower.lower)
    give_gradients(engine.upper.net)
    before = snapshot(*levels)
    found = hypergradient(engine.upper, engine.lower, method)
    assert not differences(before, snapshot(*levels))
    evaluations = interrupt(levels, 0)
    assert not differences(found, hypergradient(engine.upper, engine.lower, method))
    total = evaluations()
    assert total >= 8
    for k in sorted({1, total // 2, total}):
        interrupt(levels, k)
        with pytest.raises(Interruption):
            hypergradient(engine.upper, engine.lower, method)
        assert not differences(before, snapshot(*levels)), f"evaluation {k} of {total}"
    engine.upper.net.zero_grad()
    for run in (engine, twin):
        torch.manual_seed(2)
        run.run(2)
    assert not differences(engine.state_dict(), twin.state_dict())


@pytest.mark.parametrize(("method", "generators"), [(METHODS[0], False), (METHODS[1], True)])
def test_the_levels_above_leak_nothing_into_the_lowest(method: str, generators: bool) -> None:
    """At a learning rate of 0 above, it is trained as if alone, bit for bit."""
    engine = network_engine(method, generators=generators, rates=(0.0, 0.0, 0.05))
    torch.manual_seed(4)
    engine.run(3)
    *_, alone = network_levels(3, generators=generators)
    torch.manual_seed(4)
    fit(alone, 3 * 2 * 2 + 1, progress=False)
    assert not differences(engine.lower.lower.variables, alone.variables)
    assert not differences(*(dict(level.net.named_buffers()) for level in (engine.upper, alone)))


def test_derivatives_of_the_level_below_are_on_its_last_batch_and_masks() -> None:
    """In the middle's own gradient and in the hypergradient of the top alike."""
    u, v, w = (torch.ones(3, requires_grad=True) for _ in range(3))
    seen = []

    def below(batch: Any) -> Any:
        mask = torch.rand(3)
        seen.append((batch, mask))
        return batch * (w - mask * v).square().sum()

    levels = (
        FunctionLevel(lambda _: w.square().sum(), [u], lr=0.1),
        FunctionLevel(lambda _: (w - u * v).square().sum(), [v], lr=0.1),
        FunctionLevel(below, [w], lr=0.01, data=[1, 2, 3, 4, 5, 6, 7]),
    )
    level = Nested(*levels[1:], lower_steps=2)
    engine = Engine(levels[0], level, "cg:product=difference", lower_steps=2, progress=False)
    engine.run(1)
    numbers = [batch for batch, _ in seen]
    assert sorted(numbers) == numbers and set(numbers) == {1, 2, 3, 4}
    assert numbers.count(1) == numbers.count(3) == 1
    assert numbers.count(2) >= 2 and numbers.count(4) > numbers.count(2)
    for batch in (2, 4):
        first, *others = [mask for number, mask in seen if number == batch]
        assert all(torch.equal(mask, first) for mask in others)


LOSSES = {
    "first": lambda u, v, w: (w + v).square().sum(),
    "middle": lambda u, v, w: (v - u + w).square().sum(),
    "last": lambda u, v, w: (w - v).square().sum(),
}


def three(**losses: Any) -> Engine:
    """An engine over three levels of one number each, with other losses where given."""
    variables = leaf(1.0), leaf(1.0), leaf(1.0)
    first, *others = (
        FunctionLevel(lambda _, h=h: h(*variables), [x], lr=0.1, name=name)
        for (name, h), x in zip((LOSSES | losses).items(), variables)
    )
    return Engine(first, Nested(*others), "cg:product=difference", progress=False)


@pytest.mark.parametrize("name", LOSSES)
def test_a_level_that_is_not_finite_is_named(name: str) -> None:
    engine = three(**{name: lambda u, v, w: (u + v + w).sum() * float("nan")})
    with pytest.raises(NonFiniteError, match=f"step 1: .*{name}: .*loss"):
        engine.run(1)


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ({"last": lambda u, v, w: v.sum()}, "last"),
        ({"middle": lambda u, v, w: (w - 1).square(), "last": lambda u, v, w: w**2}, "middle"),
        ({"first": lambda u, v, w: w.square(), "middle": lambda u, v, w: (v - w) ** 2}, "first"),
    ],
)
def test_a_variable_that_no_loss_reads_is_named(losses: dict[str, Any], name: str) -> None:
    with pytest.raises(ProblemError, match=f"{name}: .*gradient"):
        three(**losses).run(1)


def test_a_variable_that_only_a_level_below_reads_is_enough() -> None:
    """v is read by f alone, as a penalty is, and u by f alone too."""
    engine = three(
        middle=lambda u, v, w: (w - 3).square().sum(),
        last=lambda u, v, w: (w - v - u).square().sum(),
    )
    engine.run(2)
    assert all(x != 1 for x in (*engine.upper.variables, *engine.lower.variables))


def plain(value: Any = None) -> FunctionLevel:
    tensor = leaf(1.0) if value is None else value
    return FunctionLevel(lambda _: tensor.sum(), [tensor], lr=0.1, name="level")


def of_a_trainer(*levels: Any) -> None:
    check_levels(SimpleNamespace(levels=levels, estimator=None))


def pair(*estimator: str, **options: Any) -> Nested:
    return Nested(plain(), plain(), *estimator, **options)


X, UNROLLED = leaf(1.0), "unrolled:steps=2,product=difference"


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Nested(plain(X), plain(X)), "variable 0"),
        (lambda: Nested(plain(), "lower"), "Problem.*str"),
        (lambda: Nested(pair(), plain()), "Nested"),
        (lambda: Nested(plain(), pair("cg"), "cg"), 'product="difference"'),
        (lambda: pair(lower_steps=0), "lower_steps"),
        (lambda: pair(warmup_steps=-1), "warmup_steps"),
        (lambda: Engine(plain(), pair(), "cg"), 'level: .* cg: .*product="difference"'),
        (lambda: Engine(plain(), pair(), UNROLLED, lower_steps=2), "level: .*unrolled.*steps=1"),
        (lambda: Engine(pair(), plain(), "direct"), "Nested"),
        (lambda: Engine(plain(X), Nested(plain(), plain(X)), "direct"), "variable 0"),
        (
            lambda: Engine(plain(), Nested(plain(), FunctionLevel(None, [leaf(1.0)]))),
            "FunctionLevel: .*opt",
        ),
        (lambda: minimize(pair()), "level"),
        (lambda: of_a_trainer(plain(), pair()), "a trainer has two"),
        (lambda: of_a_trainer(pair(), plain()), "a trainer has two"),
    ],
)
def test_mistakes_are_named(construct: Callable[..., Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        construct()
