"""What a step of `BilevelTrainer` is made of, and what is logged of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hyperopt_peft.adapters import split_parameters
from tests.support.class_weights import Penalised, Plain, Stream, Weighted, streamed
from tests.support.networks import differences
from tests.support.resume import end, saving
from tests.support.trainers import peft_model, trainer


def logs(made: Any) -> Any:
    return [record for record in made.state.log_history if "loss" in record]


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
            self.left |= control.should_epoch_stop

    left = streamed(tmp_path / "left", [Leave()], gradient_accumulation_steps=2, max_steps=2)
    short = streamed(tmp_path / "short", count=8, gradient_accumulation_steps=2, max_steps=2)
    left.train()
    short.train()
    assert not differences(end(left)["values"], end(short)["values"])


class Boasts(Plain):
    """Its numbers have the names of the Trainer's own."""

    def loss(self, batch: Any) -> Any:
        return {"loss": super().loss(batch), "grad_norm": -1.0, "learning_rate": -1.0}


def test_the_trainer_s_own_numbers_keep_their_names(tmp_path: Path) -> None:
    made = streamed(tmp_path, upper=Boasts)
    made.train()
    for record in logs(made):
        assert record["upper_grad_norm"] >= 0 and record["upper_learning_rate"] > 0


def test_a_level_s_numbers_are_means_over_the_steps_as_the_loss_is(tmp_path: Path) -> None:
    """The last step of an epoch has one micro-batch, the others have two."""
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "rows": 31}
    made = saving(tmp_path, logging_steps=3, gamma=0.1, **settings)
    made.train()
    assert len(logs(made)) == 3
    for record in logs(made):
        whole = record["lower_task_loss"] + 0.1 * record["lower_penalty"]
        assert record["loss"] == pytest.approx(whole, rel=1e-5)


class Fails(Weighted):
    """Its second loss is NaN; of every second evaluation it tells one number more."""

    calls = 0

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        loss = super().loss(batch) * (math.nan if self.calls == 2 else 1.0)
        return {"loss": loss, "task": loss, **({"odd": 1.0} if self.calls % 2 else {})}


def test_a_skipped_step_is_in_no_mean_and_in_no_later_run(tmp_path: Path) -> None:
    settings = {"hypergradient": "direct", "non_finite": "skip", "logging_steps": 3}
    made = streamed(tmp_path, lower=Fails, upper=Penalised, **settings)
    made.train()
    assert [record["skipped"] for record in logs(made)] == [1, 1, 1]
    assert all(math.isfinite(record["lower_task"]) for record in logs(made))
    for record in logs(made)[1:]:  # also beside a number that only some of the steps have
        assert record["lower_task"] == pytest.approx(record["loss"])
    made.train()
    assert not any("skipped" in record for record in logs(made))


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_each_level_s_rate_is_logged_in_whatever_order_the_groups_are(
    tmp_path: Path, number: Any
) -> None:
    model = peft_model()
    parts = split_parameters(model)
    optimizer = torch.optim.Adam(
        [
            {"params": list(parts.magnitudes.values()), "lr": number(0.5)},
            {"params": [*parts.directions.values(), *parts.rest.values()], "lr": number(0.25)},
        ]
    )
    made = trainer(
        tmp_path,
        model=model,
        options={"optimizers": (optimizer, None)},
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2,
    )
    made.train()
    record = [r for r in logs(made) if "upper_learning_rate" in r][-1]
    assert (record["learning_rate"], record["upper_learning_rate"]) == (0.25, 0.5)
