"""One level: any adapter, all examples, in the trainer of the methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, ProblemError
from hyperopt_peft.problems import DoRA
from hyperopt_peft.trainer.fingerprint import settings_of
from tests.support.trainers import QUIET, base_model, data, peft_model, values


def trainer(folder: Path, model: Any, **options: Any) -> BilevelTrainer:
    args = BilevelTrainingArguments(str(folder), max_steps=30, learning_rate=1e-1, **QUIET)
    return BilevelTrainer(model, args, **{"train_dataset": data(), **options})


def test_an_adapter_that_is_no_lora_is_trained_on_both_data_sets(tmp_path: Path) -> None:
    config = IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[])
    model = get_peft_model(base_model(dropout=0.0), config)
    run = trainer(tmp_path, model, upper_dataset=data(rows=6, seed=1))
    assert len(run.train_dataset) == 30 and run.upper_dataset is None
    assert settings_of(run)["adapter"] == "ia3"
    before, loss = values(model), run.evaluate(run.train_dataset)["eval_loss"]
    run.train()
    assert run.evaluate(run.train_dataset)["eval_loss"] < loss
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved == before.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": base_model(), "method": DoRA()}, "PeftModel"),
        ({"model": peft_model(dora=False), "method": DoRA()}, "magnitude"),
        ({"train_dataset": data(rows=0)}, "train_dataset"),
        ({"upper_dataset": data("tokens", 6)}, "do not join"),
        ({"upper_dataset": [1, 2]}, "do not join"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        trainer(tmp_path, **{"model": peft_model(), **options})
