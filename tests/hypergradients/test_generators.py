"""Losses that draw from the global generators of NumPy and Python: replayed as PyTorch's are."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperopt_peft import Problem, hypergradient
from tests.support.cases import Case, cases
from tests.support.networks import (
    differences,
    seed_all,
)
from tests.support.quadratic import FunctionLevel

# The first steps of a solver do not solve these systems, and need not.
pytestmark = pytest.mark.filterwarnings("ignore::hyperopt_peft.HypergradientWarning")
Draw = Callable[[], Tensor]
GENERATORS = pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: torch.from_numpy(np.random.normal(size=4)) ** 2, id="NumPy, normal"),
        pytest.param(lambda: torch.tensor([random.random() for _ in range(4)]), id="Python"),
    ],
)


def masked_levels(draw: Draw) -> tuple[Problem, Problem]:
    """A strongly convex f and an F with a new mask at each evaluation."""
    w, u = (torch.full((4,), x, dtype=torch.float64, requires_grad=True) for x in (0.6, 0.3))

    def below(_: Any) -> Tensor:
        return ((1 + draw()) * (w - u).square() + w.square().square()).sum()

    def above(_: Any) -> Tensor:
        return (draw() * (w - 1).square()).sum()

    descent = torch.optim.SGD([w], lr=0.05)
    return FunctionLevel(above, [u]), FunctionLevel(below, [w], optimizer=descent)


def generators() -> list[Any]:
    """By their own functions."""
    state = np.random.get_state()
    return [random.getstate(), [*state[:1], state[1].tolist(), *state[2:]], torch.get_rng_state()]


@cases()
@GENERATORS
def test_a_hypergradient_is_that_of_one_mask(case: Case, draw: Draw) -> None:
    """The one that the present states give; afterwards the generators are in these states."""
    seed_all(1)
    draw()
    (actual,) = hypergradient(*masked_levels(draw), case.estimator)
    mask = draw()
    (expected,) = hypergradient(*masked_levels(lambda: mask), case.estimator)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    seed_all(1)
    draw()
    assert torch.equal(draw(), mask)


class Interruption(Exception):
    pass


@cases()
@pytest.mark.parametrize("last", [False, True])
def test_the_generators_are_bit_identical_after_an_exception(case: Case, last: bool) -> None:
    """In the first evaluation of a loss and in the last."""
    counted: list[int] = []

    def interrupted(at: int) -> tuple[Any, Any]:
        counted.clear()

        def draw() -> Tensor:
            counted.append(random.getrandbits(8))
            np.random.normal()
            if len(counted) == at:
                raise Interruption
            return torch.rand(4)

        return masked_levels(draw)

    seed_all(1)
    np.random.normal()
    before = generators()
    hypergradient(*interrupted(at=0), case.estimator)
    assert not differences(before, generators())
    levels = interrupted(at=len(counted) if last else 1)
    with pytest.raises(Interruption):
        hypergradient(*levels, case.estimator)
    assert not differences(before, generators())
