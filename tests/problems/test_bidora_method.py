"""The method `BiDoRA` on `BilevelTrainer`, and `BiDoRATrainer`: the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import BiDoRA, BiDoRATrainer, BilevelTrainer, BilevelTrainingArguments
from tests.support.over_trl import made
from tests.support.trainers import data, peft_model, values

trl = pytest.importorskip("trl")
ARGUMENTS = {
    "max_steps": 8,
    "lower_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "upper_learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}
UPPER = {"upper_dataset": data(rows=8, seed=1)}
RETRAIN = {"learning_rate": 5e-3, "num_train_epochs": 1, "weight_decay": 0.1}
RETRAIN |= {"gradient_accumulation_steps": 2}
OLD_RETRAIN = {f"retrain_{name.removeprefix('num_train_')}": x for name, x in RETRAIN.items()}
# Options of the method, arguments of both trainers, of the old one and of the new one, data.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "direct": ({}, {}, {}, {}, {}),
    "minres": ({"gamma": 1e-2}, {"hypergradient": "minres:steps=3,damping=1.0"}, {}, {}, {}),
    "warm": ({}, {"retrain": "warm", "max_steps": 12}, {}, {}, {}),
    "scratch": ({}, {"retrain": "scratch"}, {}, {}, {}),
    "none": ({}, {"retrain": "none"}, {}, {}, {}),
    "upper set": ({}, {}, {}, {}, UPPER),
    "detach": ({"norm_grad": "detach", "fast_dora": False}, {"hypergradient": "darts"}, {}, {}, {}),
    "retrain": ({}, {}, OLD_RETRAIN, {"retrain_arguments": RETRAIN}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_method_has_the_weights_of_the_old_class(tmp_path: Path, case: str) -> None:
    options, arguments, old, new, rows = CASES[case]
    rows = {"train_dataset": data(), **rows}
    settings = {**ARGUMENTS, **arguments}
    args = BiDoRATrainer.Arguments(str(tmp_path), **settings, **options, **old)
    before = BiDoRATrainer(peft_model(), args, **rows)  # which seeds the dropout
    before.train()
    args = BilevelTrainingArguments(str(tmp_path), **settings, **new)
    after = BilevelTrainer(peft_model(), args, method=BiDoRA(**options), **rows)
    after.train()
    assert_equal(before, after)


@pytest.mark.parametrize("parent", ["SFTTrainer", "DPOTrainer"])
def test_the_same_over_a_trainer_of_trl(tmp_path: Path, parent: str) -> None:
    """The method adds the magnitudes to the config of the adapter itself."""
    kind = getattr(trl, parent)
    settings: dict[str, Any] = {"max_steps": 4, "lower_steps": 2, "upper_learning_rate": 1e-2}
    before = made(tmp_path, kind, BiDoRATrainer, adapter={"use_dora": True}, **settings)
    before.train()
    options = {"method": BiDoRA(), "lower": None}
    after = made(tmp_path, kind, BilevelTrainer, options=options, **settings)
    after.train()
    assert_equal(before, after)


def test_published_is_the_old_preset(tmp_path: Path) -> None:
    old = BiDoRATrainer.Arguments(str(tmp_path), preset="published", report_to="none")
    args = BilevelTrainingArguments(str(tmp_path), report_to="none")
    new = args.with_defaults(BiDoRA.published(gamma=1e-5).defaults)
    assert (new.estimator(), new.lower_steps) == (old.estimator(), old.lower_steps)


def assert_equal(before: Any, after: Any) -> None:
    old, new, start = values(before.model), values(after.model), values(peft_model())
    assert old.keys() == new.keys() and before.args.lower_steps == after.args.lower_steps
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert (before.retrainer is None) == (after.retrainer is None)
    assert not any(torch.equal(new[name], x) for name, x in start.items() if name in new)
