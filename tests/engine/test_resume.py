"""Stopped and continued, a run is bit-identical to one that was never stopped."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR

from hyperopt_peft import Engine, Nested, ProblemError
from tests.support.networks import differences, draw_from_all, network_levels, seed_all

STEPS = 7
WARM = ("warm", "f2sa:inner_steps=2")  # with a state between two steps
TWO = ["darts", "darts:scheme=forward", "cg", "unrolled:steps=2", "sama", *WARM]
THREE = ["darts:scheme=forward", "unrolled:product=difference"]
#: Estimator, levels, whether loaders have generators of their own, and the steps before the stop:
#: at the start, within the epochs of the levels, and at an end.
CASES = [
    *((method, 2, False, 4) for method in TWO),
    *(("darts", 2, generators, stop) for generators, stop in ((True, 0), (False, 3), (True, 6))),
    ("darts", 3, True, 3),
    *(pytest.param(method, 3, False, 4, marks=pytest.mark.slow) for method in THREE),
]


def engine(
    method: str = "darts", levels: int = 2, generators: bool = False, **options: Any
) -> Engine:
    """Adam and a schedule at each level, numbers of all generators, shuffled loaders."""
    upper, *others = network_levels(levels, generators=generators)
    lower = others[0] if levels == 2 else Nested(*others, "cg:steps=3", warmup_steps=1)
    options = {"lower_steps": 2, "warmup_steps": 1, "progress": False} | options
    draw_from_all(*upper.levels, *lower.levels)
    return Engine(upper, lower, method, **options)


def everything(run: Engine) -> dict[str, Any]:
    buffers = {name: buffer.clone() for name, buffer in run.upper.net.named_buffers()}
    return {**deepcopy(run.state_dict()), "buffers": buffers}


@pytest.mark.filterwarnings("ignore:f2sa. the relative residual")
@pytest.mark.parametrize(("method", "levels", "generators", "stop"), CASES)
def test_a_resumed_run_is_bit_identical(
    method: str, levels: int, generators: bool, stop: int, tmp_path: Path
) -> None:
    """By a new engine, and by one that has gone further; the buffers are the model's to save."""
    unbroken = engine(method, levels, generators)
    seed_all(3)
    unbroken.run(STEPS)
    first = engine(method, levels, generators)
    seed_all(3)
    first.run(stop)
    first.save(tmp_path / "new" / "engine.pt")
    buffers = deepcopy(first.upper.net.state_dict())
    first.run(2)
    for resumed in (engine(method, levels, generators), first):
        seed_all(99)
        resumed.upper.net.load_state_dict(buffers)
        resumed.load(tmp_path / "new" / "engine.pt")
        assert resumed.step == len(resumed.history) == stop
        resumed.run(STEPS - stop)
        assert not differences(everything(resumed), everything(unbroken))


def test_a_state_is_a_copy() -> None:
    run = engine()
    run.run(1)
    state = run.state_dict()
    copy = deepcopy(state)
    run.run(2)
    assert not differences(state, copy)
    run.load_state_dict(state)
    run.run(2)
    assert not differences(state, copy)


DROP = object()


def put(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    """A change of the entry at ``path``; ``value`` may be a function of the lower variables."""

    def change(state: dict[str, Any]) -> None:
        lower = state["lower"]["variables"].values() if callable(value) else ()
        made = value([v.clone().requires_grad_() for v in lower]) if callable(value) else value
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = made
        if value is DROP:
            del state[path[-1]]

    return change


drop = partial(put, DROP)


def one_cycle(w: list[Any]) -> dict[str, Any]:
    return OneCycleLR(SGD(w, lr=0.1, momentum=0.9), max_lr=1, total_steps=5).state_dict()


def two_groups(w: list[Any]) -> dict[str, Any]:
    return Adam([{"params": w[:1]}, {"params": w[1:]}]).state_dict()


#: A change of the state, and the error.
CHANGES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    *((drop(name), name) for name in ("settings", "lower", "random", "estimator", "callbacks")),
    (dict.clear, "'lower'"),
    *((drop("lower", name), name) for name in ("variables", "optimizer", "batches")),
    (put({}, "lower", "extra"), "extra"),
    (put(None, "lower"), "NoneType"),
    (drop("lower", "variables", "head.bias"), "head.bias"),
    (put(torch.ones(2), "lower", "variables", "head.bias"), "head.bias"),
    (put(two_groups, "lower", "optimizer"), "parameter groups"),
    (put(lambda w: SGD(w, lr=0.1).state_dict(), "lower", "optimizer"), "Adam"),
    (put(one_cycle, "lower", "scheduler"), "LambdaLR"),
    (put(3, "settings", "lower_steps"), "lower_steps: .* 3.* 2"),
    (put("CG()", "settings", "hypergradient"), r"hypergradient: .*CG.*xi=1.0"),
]
OF_THREE = [
    (drop("lower", "below"), "level"),
    (drop("lower", "below", "variables", "head.bias"), "level 2: variable"),
    (drop("lower", "below", "batches"), "level 2: .*state"),
    (drop("lower", "middle", "variables", "gate"), "level 1: variable 'gate'"),
    (put(7, "lower", "settings", "lower_steps"), "lower_steps"),
    (put("CG()", "lower", "settings", "hypergradient"), "hypergradient"),
]


@pytest.mark.parametrize(
    ("change", "message", "levels"),
    [*((*row, 2) for row in CHANGES), *((*row, 3) for row in OF_THREE)],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(
    change: Callable[[dict[str, Any]], None], message: str, levels: int
) -> None:
    first, second = engine(levels=levels), engine(levels=levels)
    first.run(1)
    state = deepcopy(first.state_dict())
    change(state)
    second.run(1)
    before = everything(second)
    with pytest.raises(ProblemError, match=message):
        second.load_state_dict(state)
    assert not differences(everything(second), before)
