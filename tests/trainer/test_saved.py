"""The adapter that is saved after the training is the model that was trained, for stock PEFT."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method, ProblemError
from hyperopt_peft.problems import LayerScales, LoRA
from hyperopt_peft.utils.random_state import RandomState
from tests.support.methods import ARGUMENTS, method_trainer
from tests.support.resume import require_same_end
from tests.support.trainers import base_model, data, values


@dataclass
class Late(LayerScales):
    """Folds the scales in at the end, after the second phase."""

    def finish(self, model: Any) -> Any:
        return model

    def export(self, model: Any) -> Any:
        return super().finish(model)


@dataclass
class Mixture(LoRA):
    """The sum of two adapters, which becomes one of twice the rank."""

    def prepare(self, model: Any) -> None:
        options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", **options))
        model.base_model.set_adapter(["default", "other"])

    def export(self, model: Any) -> Any:
        for names, name in ((["default", "other"], "both"), (["both"], "default")):
            model.add_weighted_adapter(names, [1.0] * len(names), name, combination_type="cat")
            model.set_adapter(name)
            for each in names:
                model.delete_adapter(each)
        return model


KINDS: dict[str, tuple[type[Method], str]] = {
    "factor": (Late, "classes"),
    "two": (Mixture, "causal"),
}


def made(folder: Path, callbacks: Any = (), *, kind: str = "factor", **settings: Any) -> Any:
    method, task = KINDS[kind]
    return method_trainer(folder, callbacks, method=method(), task=task, **settings)


def loaded_differs(run: Any, folder: Path, task: str) -> float:
    """How far the logits of the adapter that stock PEFT loads are from the model's."""
    loaded = PeftModel.from_pretrained(base_model(task), folder).eval()
    batch = run.data_collator([run.train_dataset[k] for k in range(3)])
    with torch.no_grad():
        return float((loaded(**batch).logits - run.model.eval()(**batch).logits).abs().max())


@pytest.mark.parametrize(
    ("kind", "retrain"), [("factor", "none"), ("factor", "warm"), ("two", "warm")]
)
def test_what_export_folds_is_what_stock_peft_loads(
    tmp_path: Path, kind: str, retrain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path, kind=kind, retrain=retrain)
    run.train()
    assert run.retrainer is None or run.retrainer.model is run.model
    before, state = values(run.model), RandomState.capture()
    run.save_model()
    assert values(run.model).keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in values(run.model).items())
    assert str(RandomState.capture().states) == str(state.states)
    assert loaded_differs(run, tmp_path, KINDS[kind][1]) < 1e-5
    monkeypatch.setattr(KINDS[kind][0], "export", Method.export)
    run = made(tmp_path / "left", kind=kind, retrain=retrain)
    run.train()
    with pytest.raises(ProblemError, match=r"(another model|2 adapters are active).*export"):
        run.save_model()
    run.save_model()  # once a training


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_exported_alike(tmp_path: Path, kind: str) -> None:
    """Also after the best model is loaded, which is one before `export`."""
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "load_best_model_at_end": True, "logging_steps": 2}
    stops = [(3, "search"), (3, "retrain")] if kind == "factor" else [(3,)]
    options = {"eval_dataset": data(KINDS[kind][1], rows=6, seed=5)}
    for run in require_same_end(
        tmp_path, *stops, make=made, kind=kind, options=options, **settings
    ):
        run.save_model()


def test_a_model_without_an_adapter_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, labels: Any) -> Any:
            return {"loss": (labels * self.w).sum()}

    args = BilevelTrainingArguments(str(tmp_path), **ARGUMENTS, remove_unused_columns=False)
    run = BilevelTrainer(Plain(), args, train_dataset=[{"labels": 1.0}] * 4)
    with (
        caplog.at_level(logging.INFO, "transformers"),
        caplog.at_level(logging.INFO, "hyperopt_peft"),
    ):
        run.train()
        run.save_model()
    assert "not compared with the model, since it is no PeftModel" in caplog.text
