"""What each estimator costs: passes, vectors and reads, as counted and as documented."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_memory
from hyperopt_peft import Engine, hypergradient
from hyperopt_peft.core.examples import WeightedRows
from hyperopt_peft.hypergradients import get_estimator, open_oracle, registered
from hyperopt_peft.utils import reductions
from tests.support.cases import Counted, counted
from tests.support.quadratic import FunctionLevel, program

READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu")
SIZE = 2_000_000  # of w; everything else is small beside it


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
    ours = [x for x in registered() if "hyperopt_peft" in type(get_estimator(x)).__module__]
    known = {name for name in ours if get_estimator(name).cost() is not None}
    assert {name.split(":")[0] for name in COSTS} == known


def levels(size: int) -> Any:
    """f = ½(1 + Σσ(u))·‖Xw − y‖² with 8 rows, so that graphs are small beside w."""
    torch.manual_seed(0)
    x = torch.randn(8, size) / size**0.5 * torch.linspace(1, 3, 8)[:, None]
    model, u = nn.Linear(size, 1, bias=False), torch.randn(3, requires_grad=True)
    nn.init.normal_(model.weight)
    model.get_output_embeddings = lambda: model
    target = torch.randn(8)

    class Lower(WeightedRows):
        def losses(self, _: Any) -> Tensor:
            return (model(x)[:, 0] - target).square() / 2

        def weighted(self, losses: Tensor, _: Any) -> dict[str, Tensor]:
            return {"loss": losses.sum() * (1 + u.sigmoid().sum())}

    def upper_f(_: Any) -> Tensor:
        return model(x).square().sum() + u.square().sum()

    rates = [torch.optim.SGD([v], lr=1e-3) for v in (u, model.weight)]
    lower = Lower(model, lambda _: torch.ones(8), optimizer=rates[1], name="lower")
    return FunctionLevel(upper_f, [u], optimizer=rates[0], name="upper"), lower


def passes(engine: Engine) -> list[Counted]:
    """Losses, and passes through autograd's engine."""
    losses = [(level, "loss", "losses") for level in (engine.upper, engine.lower)]
    modules = (torch.autograd, torch.autograd.graph)
    return losses + [(module, "_engine_run_backward", "backwards") for module in modules]


def engine(estimator: str, size: int = SIZE) -> Engine:
    upper, lower = levels(size)
    return Engine(upper, lower, estimator, progress=False)


@pytest.mark.parametrize("estimator", COSTS)
def test_passes_of_one_iteration(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = engine(estimator, size=100)
    ready.run(1)
    with counted(monkeypatch, *passes(ready)) as counts:
        ready.run(1)
    losses, backwards, _ = COSTS[estimator]
    if get_estimator(estimator).requirements.observe:
        backwards += 2  # through the weights of the losses, and not through the model
    assert (counts["losses"], counts["backwards"]) == (losses, backwards)


@pytest.mark.parametrize("estimator", COSTS)
def test_vectors_held_at_once(estimator: str) -> None:
    """From a fresh start, so that copies which are kept count."""
    ready = engine(estimator)
    held = peak_memory(lambda: ready.run(3), torch.device("cpu")) / (4 * SIZE)
    assert round(held) == COSTS[estimator][2]


# Each read of a number waits for the device. A few steps are counted, whatever they reach.
EACH_READ: list[Counted] = [(Tensor, name, "reads") for name in READS]
ignore_residuals = pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")


def reads(method: str, monkeypatch: pytest.MonkeyPatch) -> int:
    levels = program(0).levels()
    hypergradient(*levels, method)  # whether f runs in half precision is found once
    with counted(monkeypatch, *EACH_READ) as counts:  # without the check of exact products
        open_oracle(*levels).estimate(get_estimator(method))
    return sum(counts.values())


@ignore_residuals
@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("direct", 2),
        ("darts", 2),
        ("darts:scheme=forward", 2),
        ("neumann:terms=20", 4),
        ("neumann:terms=20,product=difference", 4),
        ("exact", 4),
        ("cg:steps=5,tolerance=0", 5 + 2),
        ("minres:steps=5,tolerance=0,product=difference", 5 + 3),  # the residual of v too
        ("nystrom:rank=3,steps=0", 9),
        ("nystrom:rank=3,steps=5,tolerance=0", 3 + 5 + 9),
        ("warm", 20 + 5),
        # F is evaluated and checked at each point beside.
        ("f2sa:inner_steps=5,tolerance=0.0", 2 * (40 + 5) + 3),
        ("f2sa:inner_steps=9,tolerance=0.0", 2 * (40 + 9) + 3),
    ],
)
def test_one_read_a_step_at_most(method: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads(method, monkeypatch) <= most


def test_all_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a read that is not made by `reductions.to_floats` counts as well."""
    with counted(monkeypatch, *EACH_READ) as counts:
        x = torch.ones(())
        values = float(x), x.item(), bool(x), x.tolist(), reductions.to_floats([x, 2 * x])
    assert sum(counts.values()) == len(values)
