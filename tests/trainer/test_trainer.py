"""`BilevelTrainer`: what it moves the variables by, and that what it inherits keeps its meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.support.trainers import QUIET, data, peft_model, trainer, values


def test_one_level_alone_is_the_trainer_itself(tmp_path: Path) -> None:
    """Same batches, masks, schedule, clipping and logs, bit by bit."""
    settings = {"max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "warmup_steps": 2}
    settings = {**QUIET, **settings, "logging_steps": 2, "seed": 3}
    args = TrainingArguments(str(tmp_path / "plain"), **settings)
    plain = Trainer(peft_model(), args, train_dataset=data())
    # The model's loss takes no num_items_in_batch into account where every micro-batch is full.
    plain.model_accepts_loss_kwargs = False
    plain.train()
    run = trainer(tmp_path / "ours", method="dora", fast_dora=False, **settings)
    run.train()
    ours, theirs = values(run.model), values(plain.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keys = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    logs = [
        [[record.get(key) for key in keys] for record in t.state.log_history if "loss" in record]
        for t in (run, plain)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3


@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
def test_settings_go_to_their_own_file_and_the_model_card(tmp_path: Path) -> None:
    run = trainer(tmp_path, hypergradient="cg:steps=2,damping=1.0")
    run.train()
    run.save_model()
    run.create_model_card()
    settings = json.loads((tmp_path / "bilevel_settings.json").read_text())
    assert settings == run.args.bilevel_settings()
    assert settings["hypergradient"] == "cg:steps=2,damping=1.0"
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "learning_rate" not in settings and not settings.keys() & adapter.keys()
    assert "- hypergradient: cg:steps=2,damping=1.0" in (tmp_path / "README.md").read_text()
