"""Bilevel trainers over SFTTrainer in each of two processes."""

from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from hyperopt_peft import BiDoRA
from tests.support.language import language_model, rows
from tests.support.over_trl import made

RUNS: dict[str, dict[str, Any]] = {
    "direct": {"layout": "completion"},
    "darts": {"layout": "messages", "gradient_accumulation_steps": 2, "optim": "sgd"},
}


def train(folder: Path, batch: int, estimator: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The logs of both phases, and the parameters at the end."""
    options = dict(RUNS[estimator])
    layout = options.pop("layout")
    trainer = made(
        folder,
        SFTTrainer,
        BiDoRA(),
        layout,
        adapter={"use_dora": True},
        options={
            # A difference divides the rounding of a Llama's norms, which are in float32.
            "model": language_model(torch.float64 if estimator == "direct" else torch.float32),
            "train_dataset": rows(layout, 16),
            "upper_dataset": rows(layout, 8, seed=1),
        },
        hypergradient=estimator,
        lower_steps=2,
        max_steps=4,
        bf16=False,
        per_device_train_batch_size=batch,
        **options,
    )
    trainer.train()
    logs = trainer.state.log_history + trainer.retrainer.state.log_history
    return logs, {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def work(folder: Path) -> dict[str, Any]:
    return {name: train(folder / name, 2, name) for name in RUNS}
