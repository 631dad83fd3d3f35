"""Stopped and continued, a run is bit-identical to one that was never stopped."""

import errno
import io
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from hyperopt_peft import Engine, Problem, ProblemError
from tests.support.networks import Classify, Network, differences, loader, owned

STEPS = 9
KEEPING = ("f2sa:inner_steps=2", "penalty:inner_steps=2")  # they go on where they ended


def engine(method: str = "darts", *, generators: bool = False, **options: Any) -> Engine:
    """Adam and a schedule at both levels, dropout, and shuffled loaders of unequal length."""
    torch.manual_seed(0)
    net = Network()
    levels = []
    for variables, size in zip(owned(net), (14, 18), strict=True):
        own = torch.Generator().manual_seed(size) if generators else None
        optimizer = Adam([v for _, v in variables], lr=0.05)
        levels.append(
            Classify(
                net,
                variables,
                data=loader(size, own),
                optimizer=optimizer,
                scheduler=LambdaLR(optimizer, lambda step: 1 / (1 + step / 5)),
            )
        )
    options = {"lower_steps": 2, "warmup_steps": 1, "progress": False} | options
    return Engine(*levels, method, **options)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state through a file that is loaded without executing code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(run: Engine) -> dict[str, Any]:
    buffers = {name: buffer.clone() for name, buffer in run.lower.net.named_buffers()}
    return {**deepcopy(run.state_dict()), "buffers": buffers}


METHODS = ["darts", "darts:scheme=forward", "cg", "unrolled:steps=2", "sama", "warm", *KEEPING]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("generators", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_a_resumed_run_is_bit_identical(method: str, generators: bool, stop: int) -> None:
    """At the start, within epochs and at their ends; the buffers are the model's to save."""
    whole = engine(method, generators=generators)
    torch.manual_seed(3)
    whole.run(STEPS)

    first = engine(method, generators=generators)
    torch.manual_seed(3)
    first.run(stop)
    state, buffers = saved(first.state_dict()), deepcopy(first.lower.net.state_dict())
    first.run(2)  # what comes after the state was taken does not count

    second = engine(method, generators=generators)
    torch.manual_seed(99)
    torch.rand(7)
    second.lower.net.load_state_dict(buffers)
    second.load_state_dict(state)
    second.run(STEPS - stop)
    assert not differences(everything(second), everything(whole))


@pytest.mark.parametrize("generators", [False, True])
@pytest.mark.parametrize("stop", [0, 2, 3])
def test_an_engine_can_return_to_its_own_past(generators: bool, stop: int) -> None:
    run = engine(generators=generators)
    run.run(stop)
    state, buffers = run.state_dict(), deepcopy(run.lower.net.state_dict())
    run.run(5)
    expected = everything(run)
    run.lower.net.load_state_dict(buffers)
    run.load_state_dict(state)
    run.run(5)
    assert not differences(everything(run), expected)


def test_a_state_is_a_copy() -> None:
    run = engine()
    run.run(1)
    state = run.state_dict()
    kept = deepcopy(state)
    run.run(2)
    assert not differences(state, kept)
    run.load_state_dict(state)
    run.run(2)
    assert not differences(state, kept)


def test_a_state_can_be_taken_in_a_callback() -> None:
    states = []

    def keep(run: Engine, record: dict[str, Any]) -> None:
        states.append(everything(run))

    run = engine(callbacks=[keep])
    run.run(3)
    assert [state["step"] for state in states] == [1, 2, 3]
    twin = engine()
    twin.run(2)
    assert not differences(states[1], everything(twin))


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def other_optimizer(state: dict[str, Any]) -> None:
    """A state of the same tensors under another optimizer."""
    variables = [v.clone().requires_grad_() for v in state["lower"]["variables"].values()]
    state["lower"]["optimizer"] = SGD(variables, lr=0.1).state_dict()


def two_groups(state: dict[str, Any]) -> None:
    variables = [v.clone().requires_grad_() for v in state["lower"]["variables"].values()]
    groups = [{"params": variables[:1]}, {"params": variables[1:]}]
    state["lower"]["optimizer"] = Adam(groups).state_dict()


def other_scheduler(state: dict[str, Any]) -> None:
    optimizer = SGD([torch.ones(1, requires_grad=True)], lr=0.1, momentum=0.9)
    schedule = OneCycleLR(optimizer, max_lr=1, total_steps=5)
    state["lower"]["scheduler"] = schedule.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        *(
            pytest.param(drop(key), id=f"without {key}")
            for key in ("settings", "step", "lower_step", "skipped", "upper", "lower", "random")
        ),
        pytest.param(drop("history"), id="without history"),
        pytest.param(drop("estimator"), id="without what the estimator kept"),
        pytest.param(put(None, "estimator"), id="with none of the estimator's"),
        pytest.param(put({"v": [torch.ones(3)]}, "estimator"), id="with a kept vector too short"),
        pytest.param(put({"v": "x"}, "estimator"), id="with a kept word"),
        *(
            pytest.param(drop("lower", key), id=f"without the level's {key}")
            for key in ("variables", "optimizer", "scheduler", "batches")
        ),
        pytest.param(put({}, "lower", "extra"), id="with an unknown part"),
        pytest.param(drop("lower", "variables", "head.bias"), id="without a variable"),
        pytest.param(put(torch.ones(3), "lower", "variables", "new"), id="with another variable"),
        pytest.param(
            put(torch.ones(2), "lower", "variables", "head.bias"), id="with another shape"
        ),
        pytest.param(put(3, "settings", "lower_steps"), id="of other lower_steps"),
        pytest.param(put(3, "settings", "warmup_steps"), id="of other warmup_steps"),
        pytest.param(put(3, "settings", "seed"), id="of another seed"),
        pytest.param(put("CG()", "settings", "hypergradient"), id="of another estimator"),
        pytest.param(two_groups, id="of other parameter groups"),
        pytest.param(other_optimizer, id="of another optimizer"),
        pytest.param(other_scheduler, id="of another scheduler"),
        pytest.param(drop("lower", "batches", "position"), id="without the data's position"),
        pytest.param(put(None, "lower"), id="with a level of the wrong type"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_nothing_changes(
    change: Callable[[dict[str, Any]], None],
) -> None:
    first = engine()
    first.run(3)
    state = deepcopy(first.state_dict())
    change(state)
    second = engine()
    second.run(1)
    before = everything(second)
    with pytest.raises(ProblemError):
        second.load_state_dict(state)
    assert not differences(everything(second), before)


@pytest.mark.parametrize("state", [None, [], {}, {"step": 1}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ProblemError, match="'lower'"):
        engine().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower_steps": 1}, "lower_steps: .* 2,.* 1"),
        ({"seed": 5}, "seed: .* 0,.* 5"),
        ({"method": "darts:xi=2"}, r"hypergradient: .*xi=1.0.*xi=2"),
    ],
)
def test_refusals_name_the_setting(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        engine(**options).load_state_dict(engine().state_dict())


@pytest.mark.parametrize("method", ["darts:scheme=forward", "unrolled:steps=2"])
def test_a_run_continues_from_its_file(method: str, tmp_path: Path) -> None:
    """Saved in a callback, the file being replaced every second step, and left in the middle."""
    whole = engine(method)
    whole.run(STEPS)
    path = tmp_path / "new" / "engine.pt"
    buffers = {}

    def save(run: Engine, record: dict[str, Any]) -> None:
        if record["step"] % 2 == 0:
            run.save(path)
            buffers[run.step] = deepcopy(run.lower.net.state_dict())
        if record["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(method, callbacks=[save]).run(STEPS)
    assert os.listdir(path.parent) == ["engine.pt"]

    resumed = engine(method)
    torch.manual_seed(99)
    resumed.load(str(path))
    assert resumed.step == len(resumed.history) == 6
    resumed.lower.net.load_state_dict(buffers[6])
    resumed.run(STEPS - resumed.step)
    assert not differences(everything(resumed), everything(whole))


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", r"engine\.pt"),
        ("emptied", r"engine\.pt"),
        ("missing", r"engine\.pt"),
        ("hostile", r"engine\.pt"),
        ("of a level", "Engine"),
        ("of another Engine", "lower_steps: .* 3,.* 2"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_nothing_changes(
    damage: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "engine.pt"
    first = engine(lower_steps=3) if damage == "of another Engine" else engine()
    first.run(2)
    first.save(path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "hostile":
        torch.save({**first.state_dict(), "history": Trap(tmp_path / "executed")}, path)
    elif damage == "of a level":
        torch.save(first.lower.state_dict(), path)
    second = engine()
    second.run(1)
    before = everything(second)
    with pytest.raises(ProblemError, match=message):
        second.load(path)
    assert not differences(everything(second), before)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.pt"
    run = engine()
    run.run(2)
    run.save(path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.run(2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ProblemError, match=r"engine\.pt"):
            run.save(path)
    second = engine()
    second.load(path)
    assert second.step == 2 and os.listdir(tmp_path) == ["engine.pt"]


def test_a_level_has_a_state_of_its_own() -> None:
    w = torch.ones(2, requires_grad=True)
    level = Problem([("w", w)], data=[1, 2, 3], optimizer=SGD([w], lr=0.1, momentum=0.9))
    level.next_batch()
    level.step([torch.ones(2)])
    state = level.state_dict()
    level.next_batch()
    level.step([torch.ones(2)])
    expected = w.detach().clone()
    level.load_state_dict(state)
    assert level.next_batch() == 2
    level.step([torch.ones(2)])
    assert torch.equal(w, expected)
    with pytest.raises(ProblemError, match="'w'"):
        level.load_state_dict({**state, "variables": {"w": torch.ones(3)}})
