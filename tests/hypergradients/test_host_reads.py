"""How often a hypergradient waits for the device: each read of a number is counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import hypergradient
from hyperopt_peft.utils import reductions
from hyperopt_peft.utils.signal_to_noise import SignalToNoise
from tests.support.quadratic import program

READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu")
# A few steps are counted, whatever they reach.
pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the reads of tensors by name, and the calls of the one function for them."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
        yield counts


def reads(method: str, monkeypatch: pytest.MonkeyPatch) -> int:
    levels = program(0).levels()
    hypergradient(*levels, method)  # whether f runs in half precision is found once
    with counted(monkeypatch) as counts:
        hypergradient(*levels, method)
    return sum(counts.values())


@pytest.mark.parametrize("product", ["exact", "difference"])
@pytest.mark.parametrize("solver", ["cg", "minres"])
@pytest.mark.parametrize("steps", [1, 5, 10])
def test_a_krylov_solver_reads_once_a_step(
    solver: str, steps: int, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside that F with its gradient is read once, and f with the result once."""
    method = f"{solver}:steps={steps},tolerance=0,product={product}"
    assert reads(method, monkeypatch) == steps + 2


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("direct", 2),
        ("darts", 2),
        ("darts:scheme=forward", 2),
        ("neumann:terms=20", 4),
        ("neumann:terms=20,product=difference", 4),
        ("exact", 4),
        ("nystrom:rank=3,steps=0", 9),
        ("nystrom:rank=3,steps=5,tolerance=0", 3 + 5 + 9),
        ("kfac:steps=5,tolerance=0", 5 + 3),
        ("warm", 20 + 5),
        ("penalty:inner_steps=5,tolerance=0.0", 6 + 4),
        ("penalty:inner_steps=9,tolerance=0.0", 10 + 4),
        # Two runs, with F evaluated and checked at each point beside.
        ("f2sa:inner_steps=5,tolerance=0.0", 2 * (6 + 6) + 8),
        ("f2sa:inner_steps=9,tolerance=0.0", 2 * (10 + 10) + 8),
    ],
)
def test_no_estimator_reads_more_than_once_a_step(
    method: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reads(method, monkeypatch) <= most


def test_all_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a read that is not made by `reductions.to_floats` counts as well."""
    with counted(monkeypatch) as counts:
        x = torch.ones(())
        values = float(x), x.item(), bool(x), x.tolist(), reductions.to_floats([x, 2 * x])
    assert sum(counts.values()) == len(values)


def test_the_signal_to_noise_ratio_is_read_once_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    signal, vectors = SignalToNoise(), torch.randn(3, 4)
    with counted(monkeypatch) as counts:
        for row in vectors:
            signal.add([row])
        assert not counts
        signal.read()
    assert sum(counts.values()) == 1
