"""BiDoRA and its baselines: every task, both phases, a plain PEFT adapter at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hyperopt_peft.adapters import split_parameters
from tests.support.trainers import TASKS, base_model, data, peft_model, trainer, values

SLOW = [pytest.param(k, "bidora", marks=pytest.mark.slow) for k in TASKS if k != "classes"]


@pytest.mark.parametrize(("kind", "method"), [("classes", "bidora"), ("causal", "lora"), *SLOW])
def test_every_task_and_method(tmp_path: Path, kind: Any, method: Any) -> None:
    """The loss on the training data falls, and stock PEFT loads what was saved."""
    run = trainer(
        tmp_path, kind, dropout=0.0, method=method, max_steps=30, learning_rate=3e-2, retrain="none"
    )
    before = run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < 0.95 * before
    run.save_model()
    assert "hyperopt" not in (tmp_path / "adapter_config.json").read_text()
    again = PeftModel.from_pretrained(base_model(kind, 0.0), tmp_path).eval()
    batch = run.data_collator([data(kind)[i] for i in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batch).logits, run.model.eval()(**batch).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("retrain", ["warm", "scratch"])
def test_retraining_moves_directions_on_all_data_with_magnitudes_as_the_search_left_them(
    tmp_path: Path, retrain: Any
) -> None:
    model = peft_model()
    start = values(model)
    options = {"retrain": retrain, "retrain_arguments": {"max_steps": 1, "learning_rate": 0.0}}
    run = trainer(tmp_path, model=model, **options)
    run.train()
    parts = split_parameters(model)
    searched = values(model)
    returned = {n for n in (*parts.directions, *parts.rest) if torch.equal(start[n], searched[n])}
    assert returned == ({*parts.directions, *parts.rest} if retrain == "scratch" else set())

    model = peft_model()
    run = trainer(tmp_path, model=model, retrain=retrain, retrain_arguments={"max_steps": 5})
    run.train()
    parts, end = split_parameters(model), values(model)
    assert all(torch.equal(end[n], searched[n]) for n in parts.magnitudes)
    assert not any(torch.equal(end[n], searched[n]) for n in parts.directions)
    assert len(run.train_dataset) < len(run.retrainer.train_dataset) == 24
    assert run.state.global_step == 6
    assert run.retrainer.state.global_step == 5


def test_retraining_has_its_own_length_rate_and_decay(tmp_path: Path) -> None:
    own = {"num_train_epochs": 2, "learning_rate": 5e-4, "weight_decay": 0.3}
    run = trainer(tmp_path, retrain="warm", retrain_arguments=own)
    run.train()
    assert run.retrainer.state.global_step == 2 * 6  # 24 examples in batches of 4
    assert run.retrainer.state.log_history[0]["learning_rate"] == 5e-4
    assert run.retrainer.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert (run.args.learning_rate, run.args.weight_decay) == (1e-2, 0.0)
