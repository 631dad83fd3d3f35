"""A loss or a gradient that is not finite: one clear error, or a skipped step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hyperopt_peft import NonFiniteError
from hyperopt_peft.engine.checkpoint import last_valid
from tests.support.networks import differences
from tests.support.resume import Stop, StopAt, end, saving
from tests.support.trainers import LENGTH, data, trainer


def spoil(made: Any, level: Any, step: Any, kind: Any) -> Any:
    """A loss or a gradient that is not finite in one step; "curvature": where w is displaced."""
    problem = getattr(made, level)
    loss, start = problem.task_loss, []

    def spoilt(batch: Any) -> Any:
        value = loss(batch)
        if made.state.global_step + 1 != step:
            return value
        now = [v.detach().clone() for v in made.lower.variables]
        start.append(now)
        displaced = any(not torch.equal(a, b) for a, b in zip(now, start[0]))
        if kind == "curvature" and not displaced:
            return value
        if kind == "loss":
            return value * float("inf")
        # Of these alone is a derivative taken at the displaced point.
        variable = (made.upper if kind == "curvature" else made.lower).variables[0]
        return value + (variable * 0).sum().abs().sqrt()  # the root of 0 has no derivative

    problem.task_loss = spoilt
    return made


class Keep(TrainerCallback):
    """The model's values as they are after each step, and before the first."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.values[state.global_step] = {name: p.detach().clone() for name, p in named}

    on_train_begin = on_step_end


FAULTS = {
    "lower loss": ("lower", "loss", "Direction: .*loss"),
    "lower gradient": ("lower", "gradient", "Direction: .*gradient"),
    "upper loss": ("upper", "loss", "darts: Magnitude: .*loss"),
    "upper gradient": ("upper", "gradient", "darts: Magnitude: .*gradient"),
    "curvature": ("lower", "curvature", "darts: .*not finite"),
}


# With the step of the fault: the first, one about the begin of an epoch, or one within it.
@pytest.mark.parametrize(
    ("fault", "micro", "step", "rows"),
    [
        ("lower loss", 1, 1, 24),
        pytest.param("lower gradient", 2, 8, 24, marks=pytest.mark.slow),
        ("upper gradient", 1, 6, 25),
        pytest.param("curvature", 2, 8, 24, marks=pytest.mark.slow),
        pytest.param("lower loss", 1, 5, 25, marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_stops(
    tmp_path: Path, fault: str, micro: int, step: int, rows: int
) -> None:
    """The step itself writes no checkpoint, and moves no variable."""
    level, kind, message = FAULTS[fault]
    settings = {"gradient_accumulation_steps": micro, "gamma": 1e-3, "rows": rows}
    keep = Keep()
    made = spoil(saving(tmp_path, [keep], **settings), level, step, kind)
    where = rf"^step {step} \(epoch \d+\.\d\d, {micro} micro-batches\): {message}"
    with pytest.raises(NonFiniteError, match=f"{where}.*non_finite='skip'$"):
        made.train()
    assert made.state.global_step == step - 1
    assert not differences(dict(made.model.named_parameters()), keep.values[step - 1])
    last = (step - 1) // 3 * 3
    assert last_valid(tmp_path) == (tmp_path / f"checkpoint-{last}" if last else None)


@pytest.mark.parametrize(
    ("fault", "micro"), [("upper loss", 1), ("lower gradient", 2), ("curvature", 2)]
)
def test_steps_can_be_skipped_and_are_counted(tmp_path: Path, fault: str, micro: int) -> None:
    level, kind, _ = FAULTS[fault]
    settings = {"gradient_accumulation_steps": micro, "non_finite": "skip", "logging_steps": 1}
    keep = Keep()
    made = spoil(saving(tmp_path, [keep], **settings), level, 8, kind)
    made.train()
    states = keep.values
    assert made.skipped == 1 and made.state.global_step == 9
    assert not differences(states[8], states[7])
    assert differences(states[9], states[8]) and differences(states[7], states[6])
    assert all(torch.isfinite(value).all() for value in states[9].values())
    logs = {r["step"]: r.get("skipped") for r in made.state.log_history if "loss" in r}
    assert logs == {**dict.fromkeys(range(1, 8)), 8: 1, 9: 1}


def test_the_count_of_skipped_steps_is_resumed(tmp_path: Path) -> None:
    whole = spoil(saving(tmp_path / "whole", non_finite="skip"), "lower", 5, "loss")
    whole.train()
    made = spoil(saving(tmp_path / "broken", [StopAt(8)], non_finite="skip"), "lower", 5, "loss")
    with pytest.raises(Stop):
        made.train()
    resumed = saving(tmp_path / "broken", non_finite="skip")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.skipped == 1 and not differences(end(resumed), end(whole))


def test_a_micro_batch_without_labels_is_named(tmp_path: Path) -> None:
    """The mean over no labels is NaN, whatever the learning rate."""
    table = data("tokens", 8)
    labels = [[-100] * LENGTH if row < 7 else each for row, each in enumerate(table["labels"][:])]
    table = table.remove_columns("labels").add_column("labels", labels)
    options = {"train_dataset": table, "upper_dataset": data("tokens", 4, seed=1)}
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    made = trainer(tmp_path, "tokens", options=options, **settings)
    with pytest.raises(NonFiniteError, match="all labels of a micro-batch are -100"):
        made.train()
