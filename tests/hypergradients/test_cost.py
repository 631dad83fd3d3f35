"""What each estimator costs: as counted, as its ``cost`` says, and as the docs' table has it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import Engine
from hyperopt_peft.diagnostics.memory import peak_memory
from hyperopt_peft.hypergradients import get_estimator, registered
from hyperopt_peft.hypergradients.estimator import Cost
from tests.support.quadratic import FunctionLevel

SIZE = 200_000  # of w; everything else is small beside it


def documented() -> dict[str, tuple[int, int, int]]:
    """Losses evaluated, backward passes and vectors held, for each estimator of the table."""
    text = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text()
    table = text.split("<!-- cost table -->")[1].split("<!-- end of cost table -->")[0]
    costs = {}
    for line in table.strip().splitlines()[2:]:
        estimator, losses, backwards, vectors = (cell.strip(" `") for cell in line.split("|")[1:-1])
        costs[estimator] = int(losses), int(backwards), int(vectors)
    return costs


COSTS = documented()


def test_the_table_has_every_estimator_that_knows_its_cost() -> None:
    known = {name for name in registered() if get_estimator(name).cost() is not None}
    assert {name.split(":")[0] for name in COSTS} == known


@pytest.mark.parametrize("estimator", COSTS)
def test_the_table_says_what_the_estimator_says(estimator: str) -> None:
    assert get_estimator(estimator).cost() == Cost(*COSTS[estimator])


def levels() -> Any:
    """f = ½‖(1 + Σσ(u))·Xw − y‖² with 4 rows, so that graphs are small beside w."""
    torch.manual_seed(0)
    x = torch.randn(4, SIZE) / SIZE**0.5
    w, u = torch.randn(SIZE, requires_grad=True), torch.randn(3, requires_grad=True)
    target = torch.randn(4)

    def f(_: Any) -> Tensor:
        return ((x @ w) * (1 + u.sigmoid().sum()) - target).square().sum() / 2

    def upper_f(_: Any) -> Tensor:
        return (x[:2] @ w).square().sum() + u.square().sum()

    rates = [torch.optim.SGD([v], lr=1e-3) for v in (u, w)]
    return (
        FunctionLevel(upper_f, [u], optimizer=rates[0], name="upper"),
        FunctionLevel(f, [w], optimizer=rates[1], name="lower"),
    )


@contextmanager
def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count losses and passes through autograd's engine."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for level in (engine.upper, engine.lower):
            patch.setattr(level, "loss", counting("losses", level.loss))
        run = counting("backwards", torch.autograd.graph._engine_run_backward)
        for module in (torch.autograd, torch.autograd.graph):
            patch.setattr(module, "_engine_run_backward", run)
        yield counts


def engine(estimator: str) -> Engine:
    upper, lower = levels()
    return Engine(upper, lower, estimator, progress=False)


@pytest.mark.parametrize("estimator", COSTS)
def test_passes_of_one_iteration(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = engine(estimator)
    ready.run(1)
    with counted(ready, monkeypatch) as counts:
        ready.run(1)
    assert (counts["losses"], counts["backwards"]) == COSTS[estimator][:2]


@pytest.mark.parametrize("estimator", COSTS)
def test_vectors_held_at_once(estimator: str) -> None:
    """From a fresh start, so that copies which are kept count."""
    ready = engine(estimator)
    held = peak_memory(lambda: ready.run(3), torch.device("cpu")) / (4 * SIZE)
    assert round(held) == COSTS[estimator][2]
