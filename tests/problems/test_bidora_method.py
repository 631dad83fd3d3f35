"""The method `BiDoRA`, whose trainer with options as arguments is `BiDoRATrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import BiDoRA, BiDoRATrainer, BilevelTrainer, BilevelTrainingArguments
from tests.support.over_trl import made
from tests.support.trainers import arguments, data, peft_model, values

trl = pytest.importorskip("trl")
OLD = {"retrain_learning_rate": 5e-3, "retrain_epochs": 1, "retrain_weight_decay": 0.1}
NEW = {"learning_rate": 5e-3, "num_train_epochs": 1, "weight_decay": 0.1}


@pytest.mark.parametrize("options", [{"gamma": 1e-2}, {"norm_grad": "detach", "fast_dora": False}])
def test_its_options_are_the_arguments_of_the_trainer(tmp_path: Path, options: Any) -> None:
    """Those of the second phase too."""
    rows = {"train_dataset": data(), "upper_dataset": data(rows=8, seed=1)}
    old = arguments(tmp_path, retrain="scratch", **options, **OLD)
    settings: dict[str, Any] = {"hypergradient": old.hypergradient, "lower_steps": 2}
    settings |= {"retrain": "scratch", "retrain_arguments": NEW, "use_cpu": True, "seed": 3}
    settings |= {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"upper_learning_rate": 1e-2, "save_strategy": "no", "report_to": "none"}
    args = BilevelTrainingArguments(str(tmp_path), **settings)
    one = BiDoRATrainer(peft_model(), old, **rows)  # which seeds the dropout
    one.train()
    two = BilevelTrainer(peft_model(), args, method=BiDoRA(**options), **rows)
    two.train()
    assert_equal(one, two)


@pytest.mark.parametrize("parent", ["SFTTrainer", "DPOTrainer"])
def test_the_method_gives_a_new_adapter_magnitudes(tmp_path: Path, parent: str) -> None:
    kind = getattr(trl, parent)
    settings: dict[str, Any] = {"max_steps": 4, "lower_steps": 2, "upper_learning_rate": 1e-2}
    one = made(tmp_path, kind, BiDoRATrainer, adapter={"use_dora": True}, **settings)
    one.train()
    options = {"method": BiDoRA(), "lower": None}
    two = made(tmp_path, kind, BilevelTrainer, options=options, **settings)
    two.train()
    assert_equal(one, two)


def test_published_is_the_preset(tmp_path: Path) -> None:
    old = BiDoRATrainer.Arguments(str(tmp_path), preset="published", report_to="none")
    args = BilevelTrainingArguments(str(tmp_path), report_to="none")
    new = args.with_defaults(BiDoRA.published(gamma=1e-5).defaults)
    assert (new.estimator(), new.lower_steps) == (old.estimator(), old.lower_steps)


def assert_equal(one: Any, two: Any) -> None:
    old, new = values(one.model), values(two.model)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert one.retrainer.state.global_step == two.retrainer.state.global_step > 0
