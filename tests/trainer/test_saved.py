"""The adapter that is saved after the training is the model that was trained, for stock PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method, ProblemError
from hyperopt_peft.adapters.layers import lora_layers
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
    with pytest.raises(ProblemError, match=r"(the new .*lora_B|2 adapters are active).*export"):
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


def test_a_model_that_an_evaluation_has_rounded_is_saved(tmp_path: Path) -> None:
    """The base model in bfloat16 is the one in float32 but for rounding."""
    options = {"eval_dataset": data(rows=6, seed=5)}
    run = method_trainer(tmp_path, method=LoRA(), options=options, bf16_full_eval=True)
    run.train()
    run.evaluate()
    assert next(run.model.parameters()).dtype == torch.bfloat16
    run.save_model()


class Wrapped(LoRA):
    """Leaves a change of the model to which stock PEFT adds the adapter."""

    def __init__(self, leave: Any) -> None:
        super().__init__()
        self.leave = leave

    def prepare(self, model: Any) -> None:
        base = model.get_base_model().bert
        forward = base.pooler.forward
        if self.leave == "a forward pass":
            base.pooler.forward = lambda *args, **options: 2 * forward(*args, **options)
        if self.leave == "a hook":
            base.pooler.register_forward_hook(lambda *args: 2 * args[-1])
        if self.leave == "a parametrisation":
            parametrize.register_parametrization(base.pooler.dense, "weight", nn.Dropout())
        if self.leave == "a module":
            base.pooler.activation = nn.ReLU()

    def export(self, model: Any) -> Any:
        config, layer = model.peft_config["default"], next(iter(lora_layers(model)))[1]
        if self.leave == "a scale":
            layer.scaling["default"] *= 2
        if self.leave == "a rank":
            config.r = 3
        if self.leave == "a kind":
            config.use_dora = True
        if self.leave == "a base weight":
            layer.get_base_layer().weight.data.mul_(2)
        return model


@pytest.mark.parametrize(
    "leave",
    [
        "a parametrisation",
        "a forward pass",
        "a hook",
        "a module",
        "a scale",
        "a rank",
        "a kind",
        "a base weight",
        "",
    ],
)
def test_what_a_method_leaves_in_the_model_is_an_error(tmp_path: Path, leave: str) -> None:
    run = method_trainer(tmp_path, method=Wrapped(leave))
    run.train()
    if leave:
        with pytest.raises(ProblemError, match=r"Wrapped: PEFT (does not save|loads another)"):
            run.save_model()
    run.save_model()


def headed(adapter: str = "default", own: bool = False, **options: Any) -> Any:
    """A model whose head, or a module of the user's own, trains beside the adapter."""
    model = base_model()
    if own:
        model.bert.pooler.activation = nn.Sequential(nn.Tanh(), nn.LayerNorm(8))
    config = LoraConfig(r=2, target_modules=["query", "value"], use_dora=False, **options)
    model = get_peft_model(model, config, adapter)
    trained = model.get_base_model().bert.pooler.activation if own else model.classifier
    if "modules_to_save" not in options:
        trained.requires_grad_(True)
    return model


@pytest.mark.parametrize("own", [False, True])
def test_what_trains_and_peft_does_not_save_is_refused_before_training(
    tmp_path: Path, own: bool
) -> None:
    part = "activation.1" if own else "classifier"
    refused = rf"{part}.weight, .*{part}.bias.*modules_to_save"
    with pytest.raises(ProblemError, match=refused):
        method_trainer(tmp_path, method=LoRA(), model=headed(own=own), save_strategy="steps")
    # A run without checkpoints may never be saved; entries that did not move say nothing of others.
    run = method_trainer(tmp_path, method=LoRA(), model=headed(own=own), learning_rate=0.0)
    run.train()
    with pytest.raises(ProblemError, match=refused):
        run.save_model()
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("part", ["classifier", "bert.pooler.activation.1"])
def test_modules_to_save_are_saved(tmp_path: Path, part: str, adapter: str) -> None:
    """PEFT has the files of an adapter of another name in a folder of that name."""
    own = part != "classifier"
    model = headed(adapter, own, modules_to_save=[part])
    run = method_trainer(tmp_path, method=LoRA(), model=model, save_strategy="steps")
    run.train()
    run.save_model()
    plain = headed(own=own).unload()
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    batch = run.data_collator([run.train_dataset[k] for k in range(3)])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, run.model.eval()(**batch).logits)
    (folder / "adapter_model.safetensors").unlink()
    run.trained = True
    run.model.save_pretrained = lambda *_, **__: save_file(
        {n: x + 1 for n, x in get_peft_model_state_dict(run.model, adapter_name=adapter).items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(ProblemError, match="PEFT loads another"):
        run.save_model()


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=4),
        LoraConfig(r=2, task_type="CAUSAL_LM", bias="all"),
        LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=[3, 4]),
        LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"], use_rslora=True),
        IA3Config(task_type="CAUSAL_LM"),
        VeraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], save_projection=False),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_adapters_of_other_kinds_are_saved(tmp_path: Path, config: Any) -> None:
    model = get_peft_model(base_model("causal"), config)
    settings = {"model": model, "task": "causal", "save_strategy": "steps"}
    run = method_trainer(tmp_path, method=Method(), **settings)
    run.train()
    run.save_model()


def test_embeddings_that_peft_saves_since_they_have_grown_may_train(tmp_path: Path) -> None:
    base = base_model("causal")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(60)
    base.get_input_embeddings().requires_grad_(True)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.get_input_embeddings().requires_grad_(True)
    settings = {"model": model, "task": "causal", "save_strategy": "steps"}
    run = method_trainer(tmp_path, method=LoRA(), **settings)
    run.train()
    run.save_model()


def test_a_model_without_an_adapter_is_not_compared(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, labels: Any) -> Any:
            return {"loss": (labels * self.w).sum()}

    args = BilevelTrainingArguments(str(tmp_path), **ARGUMENTS, remove_unused_columns=False)
    run = BilevelTrainer(Plain(), args, train_dataset=[{"labels": 1.0}] * 4)
    run.train()
    run.save_model()
    assert (tmp_path / "model.safetensors").exists()
