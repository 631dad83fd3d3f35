"""Bad settings and models get one error that names them and says what to do, before training."""

import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hyperopt_peft import BilevelTrainingArguments, ProblemError
from hyperopt_peft.problems import BiDoRATrainer
from tests.support.refusals import cases
from tests.support.trainers import arguments, base_model, data, peft_model, trainer

NAN, INFINITE = float("nan"), float("inf")
ARGUMENTS = {
    "no lower step": ({"lower_steps": 0}, "lower_steps must be at least 1, got 0"),
    "half a lower step": ({"lower_steps": 1.5}, "lower_steps must be int, got 1.5"),
    "lower steps as truth value": ({"lower_steps": True}, "lower_steps must be int, got True"),
    "upper learning rate as text": (
        {"upper_learning_rate": "1e-3"},
        "upper_learning_rate must be float, got '1e-3'",
    ),
    "upper learning rate NaN": (
        {"upper_learning_rate": NAN},
        "upper_learning_rate must be finite, got nan",
    ),
    "upper learning rate infinite": (
        {"upper_learning_rate": INFINITE},
        "upper_learning_rate must be finite, got inf",
    ),
    "upper learning rate negative": (
        {"upper_learning_rate": -1e-3},
        "upper_learning_rate must not be negative, got -0.001",
    ),
    "learning rate NaN": ({"learning_rate": NAN}, "learning_rate must be finite, got nan"),
    "learning rate as text": ({"learning_rate": "1"}, "learning_rate must be float, got '1'"),
    "weight decay NaN": ({"weight_decay": NAN}, "weight_decay must be finite, got nan"),
    "norm limit negative": ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
    "batch size": (
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size must be at least 1, got 0",
    ),
    "micro-batches": (
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps must be at least 1, got 0",
    ),
    "upper weight decay": ({"upper_weight_decay": -1.0}, "upper_weight_decay must not be negative"),
    "upper norm limit": ({"upper_max_grad_norm": -1.0}, "upper_max_grad_norm must not be negative"),
    "upper norm limit missing": (
        {"upper_max_grad_norm": None},
        "upper_max_grad_norm must be float, got None",
    ),
    "upper batch size": (
        {"per_device_upper_batch_size": 0},
        "per_device_upper_batch_size must be at least 1, got 0",
    ),
    "upper fraction zero": ({"upper_fraction": 0.0}, r"upper_fraction must be in \(0, 1\), got 0"),
    "upper fraction one": ({"upper_fraction": 1.0}, r"upper_fraction must be in \(0, 1\), got 1"),
    "upper fraction in per cent": ({"upper_fraction": 20}, r"must be in \(0, 1\), got 20"),
    "what a NaN does": ({"non_finite": "ignore"}, "non_finite must be 'raise' or 'skip'"),
    "estimator unknown": ({"hypergradient": "dart"}, "unknown estimator 'dart'; .*'darts'"),
    "estimator's option unknown": (
        {"hypergradient": "cg:step=5"},
        "cg: unknown option 'step'; did you mean 'steps'",
    ),
    "estimator's option out of range": (
        {"hypergradient": "neumann:terms=-1"},
        "neumann: terms must not be negative, got -1",
    ),
    "estimator of no known kind": ({"hypergradient": 3}, "hypergradient must be str, got 3"),
    "unrolled": (
        {"hypergradient": "unrolled:steps=2"},
        "unrolled .* only the Engine .* choose darts",
    ),
    "ξ of an estimator without": (
        {"hypergradient": "cg", "xi": 1.0},
        "xi is an option of darts, not of cg",
    ),
    "ξ negative": ({"xi": -1.0}, "darts: xi must not be negative"),
    "ξ NaN": ({"xi": NAN}, "xi must be finite, got nan"),
    "method": ({"method": "bidorra"}, "method must be 'bidora' or 'dora' or 'lora', got 'bidorra'"),
    "γ": ({"gamma": -1e-5}, "gamma must not be negative"),
    "γ as text": ({"gamma": "small"}, "gamma must be float, got 'small'"),
    "magnitude decay": ({"magnitude_decay": -1.0}, "magnitude_decay must not be negative"),
    "norm gradient": ({"norm_grad": "none"}, "norm_grad must be 'full' or 'detach', got 'none'"),
    "fast layer": ({"fast_dora": "no"}, "fast_dora must be bool, got 'no'"),
    "retraining": ({"retrain": True}, "retrain must be 'none' or 'warm' or 'scratch', got True"),
    "retraining's learning rate": (
        {"retrain_learning_rate": -1.0},
        "retrain_learning_rate must not be negative",
    ),
    "retraining's epochs": ({"retrain_epochs": 0.0}, "retrain_epochs must be positive, got 0.0"),
    "retraining's steps": ({"retrain_steps": 0}, "retrain_steps must be positive, got 0"),
}


@cases(ARGUMENTS)
def test_arguments(case, tmp_path):
    fields, message = case
    with pytest.raises(ProblemError, match=message):
        arguments(tmp_path, **fields)


def frozen_magnitudes():
    model = peft_model()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    return model


def for_inference(tmp_path, dora):
    peft_model(dora=dora).save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(base_model(), tmp_path / "adapter")


def activated(*names):
    config = LoraConfig(target_modules=["query"], use_dora=True)
    model = get_peft_model(base_model(), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(list(names))
    return model


def merged():
    model = peft_model()
    model.merge_adapter()
    return model


def tied():
    base = base_model("causal")
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    return get_peft_model(base, LoraConfig(target_modules=["lm_head"], use_dora=True))


class Quantised(nn.Linear):
    """What a quantised layer looks like: a forward of its own."""

    def forward(self, x):
        return super().forward(x)


def quantised():
    base = base_model()
    for layer in base.bert.encoder.layer:
        old = layer.attention.self.query
        layer.attention.self.query = Quantised(old.in_features, old.out_features)
    return get_peft_model(base, LoraConfig(target_modules=["query", "value"], use_dora=True))


MODELS = {
    "no PeftModel": (lambda _: base_model(), {}, "peft_model: .*Bert"),
    "no model": (lambda _: nn.Module, {}, "peft_model: .*type"),
    "no magnitudes for bidora": (
        lambda _: peft_model(dora=False),
        {},
        r"query: .*'default'.*use_dora",
    ),
    "no magnitudes for dora": (
        lambda _: peft_model(dora=False),
        {"method": "dora"},
        r"query: .*'default'.*use_dora",
    ),
    "magnitudes for lora": (
        lambda _: peft_model(),
        {"method": "lora"},
        'method="lora" needs an adapter with use_dora=False',
    ),
    "an adapter of another kind": (
        lambda _: get_peft_model(base_model(), IA3Config(target_modules=["key"])),
        {},
        "adapter 'default': ",
    ),
    "frozen magnitudes": (
        lambda _: frozen_magnitudes(),
        {},
        r"magnitude_vector.* is frozen; load adapter .*is_trainable=True",
    ),
    "loaded for inference, bidora": (
        lambda folder: for_inference(folder, dora=True),
        {},
        r"is frozen; load adapter .*is_trainable=True",
    ),
    "loaded for inference, dora": (
        lambda folder: for_inference(folder, dora=True),
        {"method": "dora"},
        r"no parameter of the model is trainable; .*is_trainable=True",
    ),
    "loaded for inference, lora": (
        lambda folder: for_inference(folder, dora=False),
        {"method": "lora"},
        r"no parameter of the model is trainable; .*is_trainable=True",
    ),
    "two active adapters": (
        lambda _: activated("default", "other"),
        {},
        r"one active adapter, found \['default', 'other'\]",
    ),
    "no active adapter": (lambda _: activated(), {}, r"one active adapter, found \[\]"),
    "merged": (lambda _: merged(), {}, "unmerge_adapter"),
    "tied target": (lambda _: tied(), {}, "lm_head: .*embed_tokens"),
    "quantised, cg": (
        lambda _: quantised(),
        {"hypergradient": "cg"},
        "hypergradient='cg' .*choose product=difference, or darts .*query adapts a Quantised",
    ),
    "quantised, darts with an exact product": (
        lambda _: quantised(),
        {"hypergradient": "darts:product=exact"},
        "hypergradient='darts:product=exact' .* choose product=difference",
    ),
    "wrapped": (
        lambda _: nn.DataParallel(peft_model()),
        {},
        "peft_model: .*DataParallel",
    ),
}


@cases(MODELS)
def test_models(case, tmp_path):
    make, settings, message = case
    with pytest.raises(ProblemError, match=message):
        BiDoRATrainer(make(tmp_path), arguments(tmp_path, **settings), train_dataset=data())


@pytest.mark.filterwarnings("ignore:use_fast_dora")
@pytest.mark.parametrize(
    "method", ["darts:scheme=forward", "cg:product=difference,steps=2", "direct"]
)
def test_a_base_that_cannot_be_read_is_trained_by_first_order_products(method, tmp_path):
    run = trainer(tmp_path, model=quantised(), hypergradient=method)
    run.train()
    assert run.state.global_step == 6


@pytest.mark.parametrize("make", [BilevelTrainingArguments, TrainingArguments, dict])
def test_arguments_of_another_trainer(make, tmp_path):
    args = make(output_dir=str(tmp_path))
    message = f"args must be BiDoRATrainingArguments, got {make.__name__}"
    with pytest.raises(ProblemError, match=message):
        BiDoRATrainer(peft_model(), args, train_dataset=data())
