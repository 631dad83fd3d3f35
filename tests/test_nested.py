"""Chains of three levels and more, against closed forms and against autograd."""

from copy import deepcopy

import pytest
import torch
from chains import chain, nested
from networks import Classify, Network, differences, loader
from quadratic import FunctionLevel
from torch import nn
from torch.nn.functional import softplus
from torch.optim import SGD, Adam

from hyperopt_peft import (
    Engine,
    Nested,
    NonFiniteError,
    Problem,
    ProblemError,
    compare_hypergradients,
    fit,
    hypergradient,
    minimise,
)
from hyperopt_peft.trainer_checks import check_levels


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# On a quadratic a difference of gradients is exact at any step length.
OUTER = {
    "exact": "exact:product=difference,radius=1.0",
    "cg": "cg:product=difference,radius=1.0,steps=30,tolerance=1e-14",
    "minres": "minres:product=difference,radius=1.0,steps=30,tolerance=1e-14",
}


@pytest.mark.parametrize("method", ["exact", "cg", "minres"])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_three_levels_have_the_closed_form(seed, settled, method):
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
        ("minres:steps=30,tolerance=1e-14,product=difference,radius=1.0", OUTER["exact"]),
        ("neumann:terms=300", OUTER["exact"]),
        ("exact:product=difference,radius=1.0", "neumann:product=difference,radius=1.0,terms=300"),
    ],
)
def test_any_solver_will_do_at_either_place(inner, outer):
    program = chain(3, sizes=(2, 2, 3))
    (found,) = hypergradient(*nested(program.levels(), inner), outer)
    assert relative_error(found, program.hypergradient()) < 1e-10


def test_four_levels_have_the_closed_form():
    program = chain(4)
    (found,) = hypergradient(*nested(program.levels()), OUTER["cg"])
    assert relative_error(found, program.hypergradient()) < 1e-12


def test_the_length_of_a_difference_grows_with_the_chain():
    """Differences of differences: one length for all would be 80 times worse."""
    program = chain(4, sizes=(1, 2, 1, 2))
    method = "exact:product=difference"
    (found,) = hypergradient(*nested(program.levels(), above=method), method)
    assert relative_error(found, program.hypergradient()) < 1e-7


def test_default_options_are_good_to_ten_digits():
    program = chain(3)
    top, middle, lower = program.levels()
    (found,) = hypergradient(top, Nested(middle, lower), "cg:product=difference,tolerance=1e-12")
    assert relative_error(found, program.hypergradient()) < 1e-10


def newton(objective, x, steps=1):
    """x after Newton steps that autograd can differentiate; one step minimises a quadratic."""
    for _ in range(steps):
        (g,) = torch.autograd.grad(objective(x), x, create_graph=True)
        rows = [torch.autograd.grad(part, x, create_graph=True)[0] for part in g]
        x = x - torch.linalg.solve(torch.stack(rows), g)
    return x


def test_it_is_the_derivative_of_the_nested_minima():
    """Autograd through argmin f, and through argmin of G over it, knows no implicit formula."""
    program = chain(3)
    program.settle()
    (found,) = hypergradient(*nested(program.levels()), OUTER["exact"])
    u, v, w = (x.detach().clone().requires_grad_() for x in program.blocks)

    def lowest(u, v):
        return newton(lambda w: program.objective(2, (u, v, w)), w)

    best = newton(lambda v: program.objective(1, (u, v, lowest(u, v))), v)
    (expected,) = torch.autograd.grad(program.objective(0, (u, best, lowest(u, best))), u)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_the_total_one():
    program = chain(3)
    program.settle()
    _, middle = nested(program.levels())
    u, v, w = (x.detach().clone().requires_grad_() for x in program.blocks)
    lowest = newton(lambda w: program.objective(2, (u, v, w)), w)
    expected = torch.autograd.grad(program.objective(1, (u, v, lowest)), (v, u))
    found = middle.gradient(None, (program.blocks[1], program.blocks[0]))
    torch.testing.assert_close(found.gradient, expected, rtol=1e-10, atol=1e-12)
    assert found.loss == program.objective(1, program.blocks).item()


def logistic():
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

    def error(w, index):
        x, y = sets[index]
        return softplus(-y * (x @ w)).mean()

    def f(w, v):
        return error(w, 0) + v.exp() @ w.square() / 2

    def g(w, v, u):
        return error(w, 1) + u[0].exp() * (v - u[1]).square().mean() / 2

    levels = (
        FunctionLevel(lambda _: error(w, 2), [u]),
        FunctionLevel(lambda _: g(w, v, u), [v]),
        FunctionLevel(lambda _: f(w, v), [w]),
    )
    minimise(levels[2], tolerance=1e-11)

    def lowest(v):
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
def test_without_following_the_second_derivatives_are_wrong(options, least, most):
    """Where no level is quadratic: one Newton step will do, and none is off by a fifth."""
    (top, middle, lower), expected = logistic()
    level = Nested(middle, lower, **options)
    (found,) = hypergradient(top, level, "exact:product=difference")
    assert least <= relative_error(found, expected) < most


@pytest.mark.parametrize("sides", [1, 2])
def test_darts_takes_the_identity_for_the_inverse(sides):
    """In training, from the start of the level's last step, with that step's own gradient."""
    program = chain(3, seed=1)
    u = program.blocks[0].detach().clone()
    method = f"darts:scale=0.5,radius=1.0,sides={sides}"
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
def test_training_reaches_the_optimum_of_the_chain(length):
    program = chain(length, sizes={3: (2, 2, 3), 4: (1, 1, 1, 1)}[length], ridge=10.0)
    method = "cg:product=difference,radius=1.0"
    top, lower = nested(program.levels(lr=0.06), "cg", method, lower_steps=2)
    engine = Engine(top, lower, method, lower_steps=2, progress=False)
    engine.run(20)
    for x, best in zip(program.blocks, program.optimum(), strict=True):
        torch.testing.assert_close(x.detach(), best, rtol=0, atol=1e-6)
    record = engine.history[-1]
    assert record["hypergradient_norm"] < 1e-5
    assert record["lower_below_gradient_norm"] < 1e-5
    assert record["lower_residual"] < 1e-5
    assert record["lower_loss"] == pytest.approx(program.objective(1, program.blocks).item())


def test_a_level_comes_after_the_steps_of_the_one_below():
    log = []
    program = chain(4, sizes=(1, 1, 1, 1))
    for k, level in enumerate(levels := program.levels()):
        inner = level.step
        level.step = lambda gradient, k=k, inner=inner: (log.append(k), inner(gradient))[1]
    first, second, third, fourth = levels
    lower = Nested(third, fourth, lower_steps=2, warmup_steps=3)
    lower = Nested(second, lower, "cg:product=difference")
    Engine(first, lower, "cg:product=difference", lower_steps=2, progress=False).run(2)
    inner = [3, 3, 2, 1]
    assert log == [3, 3, 3, *inner, *inner, 0, *inner, *inner, 0]
    log.clear()
    fit(lower, 2, progress=False)
    assert log == [*inner, *inner]


def network_chain(dropout=0.3, generators=False, lr=(0.05, 0.05), **options):
    """Three levels over one network with dropout and batch norm, on shuffled loaders."""
    torch.manual_seed(0)
    net = Network(dropout)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    above = [["temperature"], ["gate", "norm.weight"]]
    owned = [*above, [name for name in named if name not in (*above[0], *above[1])]]
    levels = []
    for k, (names, size) in enumerate(zip(owned, (10, 14, 18), strict=True)):
        own = torch.Generator().manual_seed(k) if generators else None
        variables = [(name, named[name]) for name in names]
        optimizer = Adam([v for _, v in variables], lr=[*lr, 0.05][k])
        data = loader(size, own)
        levels.append(
            Classify(net, variables, data=data, optimizer=optimizer, name=f"level {k}", **options)
        )
    return levels


METHODS = ["darts", "darts:sides=1", "cg:product=difference,steps=3", "unrolled:product=difference"]


def network_engine(method="darts", generators=False, **options):
    top, middle, lower = network_chain(generators=generators, **options)
    level = Nested(middle, lower, "cg:steps=3", lower_steps=2, warmup_steps=1)
    return Engine(top, level, method, lower_steps=2, progress=False)


def everything(engine):
    """All that may not change; the data are judged by the batches that they give."""
    net = engine.upper.net
    state = deepcopy(engine.state_dict())
    for level in (state["upper"], state["lower"], state["lower"]["below"]):
        del level["batches"]
    return {
        "state": state,
        "tensors": {k: v.clone() for k, v in {**net.state_dict()}.items()},
        "objects": {k: (id(v), v.data_ptr(), id(v.grad)) for k, v in net.named_parameters()},
        "random": torch.get_rng_state(),
        "hooks": len(nn.modules.module._global_forward_pre_hooks),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_identical(method, tmp_path):
    whole = network_engine(method)
    torch.manual_seed(3)
    whole.run(6)
    first = network_engine(method)
    torch.manual_seed(3)
    first.run(4)
    first.save(tmp_path / "state")
    buffers = deepcopy(first.upper.net.state_dict())
    first.run(1)  # what comes after the state was taken does not count
    for second in (network_engine(method), first):
        torch.manual_seed(99)
        second.upper.net.load_state_dict(buffers)
        second.load(tmp_path / "state")
        second.run(2)
        assert not differences(everything(second)["state"], everything(whole)["state"])
        assert not differences(everything(second)["tensors"], everything(whole)["tensors"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lower: lower.pop("below"), "not that of a level over others"),
        (lambda lower: lower["below"]["variables"].pop("head.bias"), "level 2: variable"),
        (lambda lower: lower["below"].pop("batches"), "level 2: the state must have"),
        (lambda lower: lower["variables"].pop("gate"), "level 1: variable 'gate'"),
        (lambda lower: lower["settings"].update(lower_steps=7), "made with lower_steps=7"),
        (lambda lower: lower["settings"].update(hypergradient="CG()"), "hypergradient='CG"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(change, message):
    first = network_engine()
    first.run(1)
    state = deepcopy(first.state_dict())
    change(state["lower"])
    second = network_engine()
    second.run(2)
    before = everything(second)
    with pytest.raises(ProblemError, match=message):
        second.load_state_dict(state)
    assert not differences(everything(second), before)


class Interruption(Exception):
    pass


def interrupt(levels, at):
    """Make the ``at``-th evaluation of any loss fail; returns the count."""
    count = 0

    def wrap(loss):
        def wrapped(batch):
            nonlocal count
            count += 1
            if count == at:
                raise Interruption
            return loss(batch)

        return wrapped

    for level in levels:
        level.loss = wrap(level.loss)
    return lambda: count


@pytest.mark.parametrize("method", METHODS)
def test_a_hypergradient_leaves_no_trace(method):
    """Also not one that fails in any of its evaluations, nor in the batches to come."""
    engine, twin = network_engine(method), network_engine(method)
    for each in (engine, twin):
        torch.manual_seed(1)
        each.run(2)
    levels = (engine.upper, engine.lower.middle, engine.lower.lower)
    for parameter in engine.upper.net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = everything(engine)
    found = hypergradient(engine.upper, engine.lower, method)
    assert not differences(before, everything(engine))
    assert not differences(found, hypergradient(engine.upper, engine.lower, method))
    losses = [level.loss for level in levels]
    total = interrupt(levels, at=0)
    hypergradient(engine.upper, engine.lower, method)
    assert total() >= 8
    for k in sorted({1, 2, 3, 5, 8, total() // 2, total() - 1, total()}):
        for level, loss in zip(levels, losses, strict=True):
            level.loss = loss
        interrupt(levels, at=k)
        with pytest.raises(Interruption):
            hypergradient(engine.upper, engine.lower, method)
        assert not differences(before, everything(engine)), f"evaluation {k} of {total()}"
    for level, loss in zip(levels, losses, strict=True):
        level.loss = loss
    for parameter in engine.upper.net.parameters():
        parameter.grad = None
    for each in (engine, twin):
        torch.manual_seed(2)
        each.run(2)
    assert not differences(engine.state_dict(), twin.state_dict())


@pytest.mark.parametrize("generators", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_levels_above_leak_nothing_into_the_lowest(method, generators):
    """At a learning rate of 0 above, it is trained as if alone, bit for bit."""
    engine = network_engine(method, generators, lr=(0.0, 0.0))
    torch.manual_seed(4)
    engine.run(3)
    *_, alone = network_chain(generators=generators)
    torch.manual_seed(4)
    fit(alone, 3 * 2 * 2 + 1, progress=False)
    assert not differences(engine.lower.lower.variables, alone.variables)
    assert not differences(*(dict(level.net.named_buffers()) for level in (engine.upper, alone)))


def test_each_step_of_the_middle_draws_its_own_masks():
    """Also where the level below draws no random numbers, which would move the stream."""
    u, v, w = (torch.ones(4, requires_grad=True) for _ in range(3))
    seen = []

    def middle(_):
        mask = torch.rand(4)
        seen.append(mask)
        return (mask * (v - w)).square().sum() + (v * u).sum()

    levels = (
        FunctionLevel(lambda _: w.square().sum(), [u], optimizer=SGD([u], lr=0.1)),
        FunctionLevel(middle, [v], optimizer=SGD([v], lr=0.1)),
        FunctionLevel(lambda _: (w - v).square().sum(), [w], optimizer=SGD([w], lr=0.1)),
    )
    level = Nested(*levels[1:], "cg:steps=4")
    Engine(levels[0], level, "cg:product=difference,steps=4", progress=False).run(3)
    # One mask a step, in all evaluations: in the step itself and in the hypergradient after it.
    steps = [k for k, mask in enumerate(seen) if k == 0 or not torch.equal(mask, seen[k - 1])]
    assert len(steps) == 3 and all(b - a > 2 for a, b in zip(steps, [*steps[1:], len(seen)]))


def leaf(value=1.0):
    return torch.tensor([value], requires_grad=True)


def three(f=None, g=None, top=None, non_finite="raise", **options):
    """An engine over three levels of one number each, with other losses where given."""
    u, v, w = leaf(), leaf(), leaf()
    g, f, top = (
        g or (lambda u, v, w: (v - u + w).square().sum()),
        f or (lambda u, v, w: (w - v).square().sum()),
        top or (lambda u, v, w: (w + v).square().sum()),
    )
    first, middle, lower = (
        FunctionLevel(lambda _, h=h: h(u, v, w), [x], optimizer=SGD([x], lr=0.1), name=name)
        for h, x, name in ((top, u, "first"), (g, v, "middle"), (f, w, "last"))
    )
    level = Nested(middle, lower, **options)
    return Engine(first, level, "cg:product=difference", non_finite=non_finite, progress=False)


@pytest.mark.parametrize("level", ["top", "g", "f"])
def test_a_level_that_is_not_finite_is_named(level):
    name = {"top": "first", "g": "middle", "f": "last"}[level]
    engine = three(**{level: lambda u, v, w: (u + v + w).sum() * float("nan")})
    with pytest.raises(NonFiniteError, match=f"step 1: .*{name}: the loss is nan"):
        engine.run(1)


def test_steps_that_are_not_finite_can_be_skipped():
    calls = []

    def now_and_then(u, v, w):
        calls.append(1)
        return (w - v).square().sum() * (float("inf") if len(calls) == 5 else 1)

    engine = three(f=now_and_then, non_finite="skip")
    records = engine.run(4)
    assert engine.skipped == 1 and len(records) >= 3
    assert all(torch.isfinite(x) for level in engine.lower.levels for x in level.variables)


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ({"f": lambda u, v, w: v.sum()}, "last: no loss reads the variable"),
        (
            {
                "g": lambda u, v, w: (w - 1).square().sum(),
                "f": lambda u, v, w: w.square().sum(),
            },
            "middle: no loss reads the variable",
        ),
        (
            {
                "top": lambda u, v, w: w.square().sum(),
                "g": lambda u, v, w: (v - w).square().sum(),
            },
            "first: no loss reads the variable",
        ),
    ],
)
def test_a_variable_that_no_loss_reads_is_named(losses, name):
    with pytest.raises(ProblemError, match=name):
        three(**losses).run(1)


def test_a_variable_that_only_a_level_below_reads_is_enough():
    """v is read by f alone, as a penalty is, and u by f alone too."""
    engine = three(
        top=lambda u, v, w: (w + v).square().sum(),
        g=lambda u, v, w: (w - 3).square().sum(),
        f=lambda u, v, w: (w - v - u).square().sum(),
    )
    engine.run(2)
    assert all(x != 1 for x in (*engine.upper.variables, *engine.lower.variables))


class Plain(Problem):
    def loss(self, batch):
        return sum(v.sum() for v in self.variables)


def plain(value=None, name="level", **options):
    tensor = leaf() if value is None else value
    return Plain([tensor], optimizer=SGD([tensor], lr=0.1), name=name, **options)


X = leaf()


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Nested(plain(X), plain(X)), "own the same tensor"),
        (lambda: Nested(plain(), "lower"), "a level must be a Problem, got str"),
        (lambda: Nested(Nested(plain(), plain()), plain()), "must be the lowest.*Nested"),
        (lambda: Nested(plain(), Nested(plain(), plain(), "cg"), "cg"), 'product="difference"'),
        (lambda: Nested(plain(), plain(), "cgg"), "unknown estimator 'cgg'"),
        (lambda: Nested(plain(), plain(), lower_steps=0), "lower_steps must be a whole number"),
        (lambda: Nested(plain(), plain(), warmup_steps=-1), "warmup_steps must be a whole"),
        (lambda: Nested(plain(), plain(), follow=0.5), "follow must be a whole number"),
        (lambda: Nested(plain(), plain(), "darts", follow=1), "darts is no solver.*follow=0"),
        (
            lambda: Engine(plain(), Nested(plain(), plain()), "cg"),
            'cg: level: the level stands on another.*choose product="difference"',
        ),
        (
            lambda: hypergradient(plain(), Nested(plain(), plain()), "exact"),
            'exact: level: the level stands on another.*choose product="difference"',
        ),
        (
            lambda: Engine(
                plain(),
                Nested(plain(), plain()),
                "unrolled:steps=2,product=difference",
                lower_steps=2,
            ),
            "unrolled: it looks back on 2 steps of level.*choose steps=1",
        ),
        (lambda: Engine(Nested(plain(), plain()), plain(), "direct"), "must be the lowest"),
        (lambda: Engine(plain(X), Nested(plain(), plain(X)), "direct"), "own the same tensor"),
        (
            lambda: Engine(plain(), Nested(plain(), Plain([leaf()], name="last")), "direct"),
            "last: give the level an optimizer",
        ),
        (lambda: minimise(Nested(plain(), plain())), "stands on other levels"),
        (lambda: check_levels([plain(), Nested(plain(), plain())]), "a trainer has two"),
        (lambda: check_levels([Nested(plain(), plain()), plain()]), "a trainer has two"),
    ],
)
def test_mistakes_are_named(construct, message):
    with pytest.raises(ProblemError, match=message):
        construct()


def test_estimators_can_be_compared_on_a_chain():
    levels = nested(chain(3).levels())
    methods = ["cg:product=difference", "cg", "darts", "direct"]
    table = compare_hypergradients(*levels, methods, OUTER["exact"], repeats=1)
    cg, refused, darts, direct = table.records()
    assert cg["relative_error"] < 1e-4 < direct["relative_error"]
    assert 'product="difference"' in refused["problem"]
    assert 0 < darts["cosine"] < 1


def test_half_precision_is_displaced_in_single_precision():
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
