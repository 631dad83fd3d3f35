"""What a step of `BilevelTrainer` moves, and its micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from hyperopt_peft import BilevelTrainer, Problem
from hyperopt_peft.trainer.step import Accumulated, MicroBatch
from hyperopt_peft.utils.random_state import RandomState
from tests.support.class_weights import Stream, streamed
from tests.support.networks import differences
from tests.support.quadratic import FunctionLevel
from tests.support.resume import end
from tests.support.trainers import arguments


@pytest.mark.parametrize(("lower_steps", "accumulation"), [(1, 1), (2, 2)])
def test_variables_outside_of_the_model_move_by_their_own_gradients(
    tmp_path: Path, lower_steps: int, accumulation: int
) -> None:
    """f = ½ mean (w − u x)² + ½ (v − u)², F = ½ (w − 1)² + ½ (v − 2)²; only w is the model's."""
    model = nn.Module()
    w = model.w = nn.Parameter(torch.tensor(-0.4, dtype=torch.float64))
    v, u = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.5))
    x = torch.tensor([1.0, 2.0, 4.0, 5.0])
    lower = FunctionLevel(
        lambda batch: ((w - u * batch["x"].double()) ** 2).mean() / 2 + (v - u) ** 2 / 2,
        {"w": w, "v": v},
        name="lower",
    )
    upper = FunctionLevel(lambda _: ((w - 1) ** 2 + (v - 2) ** 2) / 2, {"u": u}, name="upper")
    settings = {"max_steps": 4, "lower_steps": lower_steps, "optim": "sgd", "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 4 // accumulation, "upper_max_grad_norm": 0.0}
    settings |= {"gradient_accumulation_steps": accumulation, "remove_unused_columns": False}
    settings |= {"learning_rate": 0.1, "upper_learning_rate": 0.2, "lr_scheduler_type": "constant"}
    rows = {"train_dataset": Dataset.from_dict({"x": x.tolist()})}
    rows["upper_dataset"] = Dataset.from_dict({"x": [0.0, 3.0]})
    levels = {"lower": lower, "upper": upper}
    BilevelTrainer(model, arguments(tmp_path, **settings), **levels, **rows).train()

    w0, v0, u0, mean = -0.4, 0.3, 0.5, float(x.mean())
    for step in range(1, 5):
        hypergradient = mean * (w0 - 1) + (v0 - 2)  # −∂²f/∂u∂w · ∂F/∂w
        w0, v0, old = w0 - 0.1 * (w0 - u0 * mean), v0 - 0.1 * (v0 - u0), u0
        u0 = old - 0.2 * hypergradient if step % lower_steps == 0 else old
    assert [float(w), float(v), float(u)] == pytest.approx([w0, v0, u0], abs=1e-6)


def test_a_stream_begins_again_within_a_step(tmp_path: Path) -> None:
    """A stream of five micro-batches, two to a step, is one of ten, read twice as long."""
    five = streamed(tmp_path / "5", count=20, gradient_accumulation_steps=2)
    whole = Stream(20)
    whole.rows = 2 * whole.rows
    twice = streamed(tmp_path / "10", data=whole, gradient_accumulation_steps=2)
    five.train()
    twice.train()
    assert five.state.global_step == 9
    assert not differences(end(five)["values"], end(twice)["values"])


def test_a_step_that_a_callback_breaks_off_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """A stream that is left in its second step is one of a single step."""

    class Leave(TrainerCallback):
        left = False

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 1 and not self.left
            if control.should_epoch_stop:
                self.left = True

    left = streamed(tmp_path / "left", [Leave()], gradient_accumulation_steps=2, max_steps=2)
    short = streamed(tmp_path / "short", count=8, gradient_accumulation_steps=2, max_steps=2)
    left.train()
    short.train()
    assert not differences(end(left)["values"], end(short)["values"])


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
