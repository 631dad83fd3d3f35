"""What a chain may change, and what of it is saved: resumed runs, purity, random numbers."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from hyperopt_peft import Engine, Nested, ProblemError, hypergradient
from hyperopt_peft.engine import fit
from tests.support.networks import Classify, Network, differences, loader
from tests.support.quadratic import FunctionLevel


def network_chain(
    dropout: float = 0.3, generators: bool = False, lr: Any = (0.05, 0.05), **options: Any
) -> Any:
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


METHODS = [
    "darts",
    "darts:scheme=forward",
    "cg:product=difference,steps=3",
    "unrolled:product=difference",
]


def network_engine(method: str = "darts", generators: bool = False, **options: Any) -> Engine:
    top, middle, lower = network_chain(generators=generators, **options)
    level = Nested(middle, lower, "cg:steps=3", lower_steps=2, warmup_steps=1)
    return Engine(top, level, method, lower_steps=2, progress=False)


def everything(engine: Any) -> dict[str, Any]:
    """All that may not change; the data are judged by the batches that they give."""
    net = engine.upper.net
    state = deepcopy(engine.state_dict())
    for level in (state["upper"], state["lower"]["middle"], state["lower"]["below"]):
        del level["batches"]
    return {
        "state": state,
        "tensors": {k: v.clone() for k, v in {**net.state_dict()}.items()},
        "objects": {k: (id(v), v.data_ptr(), id(v.grad)) for k, v in net.named_parameters()},
        "random": torch.get_rng_state(),
        "hooks": len(nn.modules.module._global_forward_pre_hooks),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_identical(method: str, tmp_path: Path) -> None:
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
        (lambda lower: lower.pop("below"), "level"),
        (lambda lower: lower["below"]["variables"].pop("head.bias"), "level 2: variable"),
        (lambda lower: lower["below"].pop("batches"), "level 2: .*state"),
        (lambda lower: lower["middle"]["variables"].pop("gate"), "level 1: variable 'gate'"),
        (lambda lower: lower["settings"].update(lower_steps=7), "lower_steps"),
        (lambda lower: lower["settings"].update(hypergradient="CG()"), "hypergradient"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(
    change: Callable[..., Any], message: str
) -> None:
    first = network_engine()
    first.run(1)
    state = deepcopy(first.state_dict())
    change(state["lower"])
    second = network_engine()
    second.run(2)
    before = everything(second)
    with pytest.raises(ProblemError, match=message):
        second.load_state_dict(state)
    with pytest.raises(ProblemError, match=message):
        second.lower.load_state_dict(state["lower"])
    assert not differences(everything(second), before)


class Interruption(Exception):
    pass


def interrupt(levels: Any, at: Any) -> Any:
    """Make the ``at``-th evaluation of any loss fail; returns the count."""
    count = 0

    def wrap(loss: Any) -> Any:
        def wrapped(batch: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Interruption
            return loss(batch)

        return wrapped

    for level in levels:
        level.loss = wrap(level.loss)
    return lambda: count


@pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_hypergradient_leaves_no_trace(method: str) -> None:
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
def test_the_levels_above_leak_nothing_into_the_lowest(method: str, generators: bool) -> None:
    """At a learning rate of 0 above, it is trained as if alone, bit for bit."""
    engine = network_engine(method, generators, lr=(0.0, 0.0))
    torch.manual_seed(4)
    engine.run(3)
    *_, alone = network_chain(generators=generators)
    torch.manual_seed(4)
    fit(alone, 3 * 2 * 2 + 1, progress=False)
    assert not differences(engine.lower.lower.variables, alone.variables)
    assert not differences(*(dict(level.net.named_buffers()) for level in (engine.upper, alone)))


def test_each_step_of_the_middle_draws_its_own_masks() -> None:
    """Also where the level below draws no random numbers, which would move the stream."""
    u, v, w = (torch.ones(4, requires_grad=True) for _ in range(3))
    seen = []

    def middle(_: Any) -> Any:
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


def test_derivatives_of_the_level_below_are_on_its_last_batch_and_masks() -> None:
    """In the middle's own gradient and in the hypergradient of the top alike."""
    u, v, w = (torch.ones(3, requires_grad=True) for _ in range(3))
    seen = []

    def below(batch: Any) -> Any:
        mask = torch.rand(3)
        seen.append((batch, mask))
        return batch * (w - mask * v).square().sum()

    levels = (
        FunctionLevel(lambda _: w.square().sum(), [u], optimizer=SGD([u], lr=0.1)),
        FunctionLevel(lambda _: (w - u * v).square().sum(), [v], optimizer=SGD([v], lr=0.1)),
        FunctionLevel(below, [w], optimizer=SGD([w], lr=0.01), data=[1, 2, 3, 4, 5, 6, 7]),
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
