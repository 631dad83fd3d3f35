"""The stock early stopping ends a run with the best levels; the gap to unseen rows is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.support.class_weights import pair, rows
from tests.support.trainers import data, trainer


class Keep(TrainerCallback):
    """The upper variable at each evaluation."""

    def __init__(self) -> None:
        self.points: list[Any] = []
        self.weight: Any = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.points.append(self.weight.detach().clone())


def test_early_stopping_ends_with_the_best_levels(tmp_path: Path) -> None:
    """On labels that contradict the training set, whose loss rises as the model learns."""
    wrong = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows(64, 2)]
    keep = Keep()
    run, weight = pair(
        tmp_path,
        callbacks=[keep, EarlyStoppingCallback(early_stopping_patience=2)],
        evaluation=wrong,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    keep.weight = weight
    run.train()
    losses = [r["eval_loss"] for r in run.state.log_history if "eval_loss" in r]
    assert losses[0] < losses[1] and losses[0] < losses[2]
    assert run.state.global_step == 6 and len(losses) == 3
    assert torch.equal(weight, keep.points[0]) and not torch.equal(weight, keep.points[-1])
    best = load_file(Path(run.state.best_model_checkpoint) / "levels.safetensors")
    for name, value in run.named_tensors():
        assert torch.equal(value, best[name])


def test_the_gap_is_of_the_trainer_s_own_loss(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "max_steps": 6}
    run = trainer(tmp_path / "own", options={"eval_dataset": data(seed=9)}, **settings)
    run.train()
    above, found = None, []
    for record in run.state.log_history:
        above = record.get("upper_loss", above)
        if "eval_loss" in record:
            assert record["eval_upper_gap"] == pytest.approx(record["eval_loss"] - above)
            found.append(record)
    assert len(found) == 2
    assert "eval_upper_gap" not in run.evaluate()  # after training it would be of another time

    other, _ = pair(tmp_path / "other", evaluation=rows(8, 2), **settings)
    other.train()  # the levels' losses are not the model's
    assert not any("eval_upper_gap" in record for record in other.state.log_history)
