"""Micro-batches of a step: their precision, and variables and metrics that only some have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperopt_peft import Problem
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState


class Fit(Problem):
    """Mean squared error."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        super().__init__(self.net.named_parameters())

    def loss(self, batch: Any) -> Any:
        x, y = batch
        error = (self.net(x) - y).square().mean()
        return {"loss": error, "error": error}


def examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, 1, generator=generator, dtype=torch.float64)


def micro_batches(*batches: Any) -> list[MicroBatch]:
    state = RandomState.seeded([torch.device("cpu")], 0)
    return [MicroBatch(batch, state) for batch in batches]


class Halved(Fit):
    def loss(self, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(batch)["loss"]


@pytest.mark.parametrize("ask", ["evaluate", "gradient"])
@pytest.mark.parametrize("kind", [Fit, Halved])
def test_it_runs_in_half_precision_where_the_level_does(kind: type[Fit], ask: str) -> None:
    """Differences are taken in single precision then, and would be noise otherwise."""
    level = kind()
    level.net.float()
    accumulated = Accumulated(level)
    assert accumulated.evaluated.half is None
    options = () if ask == "evaluate" else (accumulated.variables,)
    getattr(accumulated, ask)(micro_batches([x.float() for x in examples(6)]), *options)
    assert accumulated.evaluated.half is (kind is Halved)


def test_a_variable_that_one_micro_batch_does_not_read_counts_as_zero_there() -> None:
    w, v, idle = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 3.0, 0.0))

    class Some(Problem):
        def loss(self, batch: Any) -> Any:
            return w * batch if batch > 0 else v * batch

    batch = micro_batches(*(torch.tensor(x) for x in (1.0, -4.0, 2.0, -6.0)))
    found = Accumulated(Some([w, v, idle])).gradient(batch, (w, v, idle))
    assert found.loss == (1 * 2 - 4 * 3 + 2 * 2 - 6 * 3) / 4
    assert found.gradient == (3 / 4, -10 / 4, None)


def test_a_metric_of_some_micro_batches_is_the_mean_over_these() -> None:
    class Sometimes(Fit):
        def loss(self, batch: Any) -> Any:
            name = "long" if len(batch[0]) > 2 else "short"
            return {"loss": super().loss(batch)["loss"], name: 1.0}

    level = Accumulated(Sometimes())
    batch = micro_batches(*map(examples, (3, 2, 4)))
    assert level.gradient(batch, level.variables).metrics == {"long": 1.0, "short": 1.0}
    assert level.evaluate(batch)[1] == {"long": 1.0, "short": 1.0}
