"""F on held-out rows: evaluated without trace, logged, and the end of a run at its smallest."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import EarlyStopping, Engine, ProblemError
from tests.support.networks import differences, loader, network_levels
from tests.support.quadratic import FunctionLevel


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def following(**options: Any) -> tuple[Any, ...]:
    """w follows u at once, and u goes from 0 to the row above: w = u = 5·(1 − 0.8^k)."""
    u, w = leaf(0.0), leaf(0.0)
    rows = [torch.tensor(5.0).double()]
    upper = FunctionLevel(lambda y: (w - y).square(), [u], data=rows, lr=0.1, **options)
    lower = FunctionLevel(lambda _: (w - u).square(), [w], lr=0.5)
    return upper, lower, u, w


def path(steps: int) -> list[float]:
    return [5 * (1 - 0.8**k) for k in range(steps + 1)]


@pytest.mark.parametrize(("every", "patience"), [(1, 1), (2, 3)])
def test_the_run_ends_with_the_best_variables(every: int, patience: int) -> None:
    """Of both levels; at an evaluation w is where u was before the step."""
    upper, lower, u, w = following()
    held_out = [torch.tensor(x).double() for x in (2.0, 3.0)]
    stopping = EarlyStopping(held_out, every=every, patience=patience)
    engine = Engine(upper, lower, "cg", callbacks=[stopping], progress=False)
    history = engine.run(100)
    points = path(100)
    losses = {k: ((points[k - 1] - 2) ** 2 + (points[k - 1] - 3) ** 2) / 2 for k in range(1, 101)}
    evaluated = {k: losses[k] for k in losses if k % every == 0}
    best = min(evaluated, key=evaluated.__getitem__)
    assert len(history) == best + patience * every
    assert stopping.best_step == best and stopping.best == pytest.approx(losses[best])
    assert u.item() == pytest.approx(points[best]) and w.item() == pytest.approx(points[best - 1])
    for record in history:
        k = record["step"]
        if k % every:
            assert "held_out_loss" not in record
            continue
        window = history[k - every : k]
        gap = losses[k] - sum(each["upper_loss"] for each in window) / every
        assert record["held_out_loss"] == pytest.approx(losses[k])
        assert record["upper_gap"] == pytest.approx(gap)
        assert (record["upper_snr"] is None) == (every == 1)


def test_the_prior_is_no_part_of_the_held_out_loss() -> None:
    upper, lower, _, _ = following(prior=4.0)
    rows = [torch.tensor(5.0).double()]
    stopping = EarlyStopping(rows, every=1, patience=50)
    history = Engine(upper, lower, "cg", callbacks=[stopping], progress=False).run(5)
    assert history[-1]["upper_prior"] > 0
    assert all(record["upper_gap"] == pytest.approx(0, abs=1e-12) for record in history)


def trained(*callbacks: Any) -> Any:
    torch.manual_seed(3)
    upper, lower = network_levels()
    engine = Engine(upper, lower, "darts", lower_steps=2, callbacks=callbacks, progress=False)
    engine.run(6)
    return engine


def test_an_evaluation_leaves_no_trace() -> None:
    """In a network that drops, normalises and remembers, with a shuffled loader held out."""
    plain, watched = trained(), trained(EarlyStopping(loader(11), every=2))
    ends = [
        [run.upper.state_dict(), run.lower.state_dict(), run.upper.net.state_dict()]
        for run in (plain, watched)
    ]
    assert not differences(*ends)
    assert torch.equal(plain.state_dict()["random"]["cpu"], watched.state_dict()["random"]["cpu"])


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_ends_where_it_would_have(stop: int) -> None:
    def made() -> tuple[Any, ...]:
        upper, lower, u, w = following()
        stopping = EarlyStopping([torch.tensor(2.5).double()], every=1, patience=7)
        engine = Engine(upper, lower, "cg", callbacks=[stopping], progress=False)
        return engine, stopping, u, w

    engine, stopping, u, w = made()
    engine.run(100)
    first = made()[0]
    first.run(stop)
    state = deepcopy(first.state_dict())
    resumed, again, u_again, w_again = made()
    resumed.load_state_dict(state)
    resumed.run(100)
    assert [u.item(), w.item()] == [u_again.item(), w_again.item()]
    assert stopping.state_dict() == again.state_dict()
    assert resumed.history == engine.history
    without = Engine(*following()[:2], "cg", progress=False)
    with pytest.raises(ProblemError, match="callbacks"):
        without.load_state_dict(state)


def test_a_run_that_ends_by_its_steps_can_return_to_the_best() -> None:
    upper, lower, u, _ = following()
    stopping = EarlyStopping([torch.tensor(2.5).double()], every=1, patience=50)
    engine = Engine(upper, lower, "cg", callbacks=[stopping], progress=False)
    with pytest.raises(ProblemError, match="held_out"):
        stopping.restore(engine)
    engine.run(20)
    assert u.item() == pytest.approx(path(20)[-1])
    stopping.restore(engine)
    assert u.item() == pytest.approx(path(20)[stopping.best_step])


class Nothing:
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("held_out", "options", "named"),
    [
        ([], {}, "held_out"),
        (iter([1]), {}, "held_out"),
        (torch.ones(3), {}, "held_out"),
        ([1], {"every": 0}, "every"),
        ([1], {"patience": 0}, "patience"),
        (Nothing(), {"every": 1}, "held_out"),
    ],
)
def test_mistakes_are_named(held_out: Any, options: Any, named: str) -> None:
    def run() -> None:
        stopping = EarlyStopping(held_out, **options)
        Engine(*following()[:2], "cg", callbacks=[stopping], progress=False).run(1)

    with pytest.raises(ProblemError, match=named):
        run()
