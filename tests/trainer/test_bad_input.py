"""Bad settings and models get one error that names them and says what to do, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hyperopt_peft import BiDoRA, BilevelTrainer, ProblemError
from tests.support.refusals import cases
from tests.support.trainers import arguments, base_model, data, peft_model, trainer

NAN, INFINITE = float("nan"), float("inf")
# Each argument that an error must name, with values that it refuses.
ARGUMENTS: dict[str, list[Any]] = {
    "lower_steps": [0, 1.5, True],
    "upper_learning_rate": ["1e-3", NAN, INFINITE, -1e-3],
    "learning_rate": [NAN],
    "weight_decay": [NAN],
    "max_grad_norm": [-1.0],
    "per_device_train_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "upper_weight_decay": [-1.0],
    "upper_max_grad_norm": [-1.0, None],
    "upper_prior": [-1.0, NAN, "1"],
    "per_device_upper_batch_size": [0],
    "seed": [-3, 2**32],
    "data_seed": [-3],
    "upper_fraction": [0.0, 1.0, 20],
    "non_finite": ["ignore"],
    "hypergradient": [3, "unrolled:steps=2"],
    "retrain": [True],
    "retrain_arguments": [{"learning_rate": -1.0}, {"num_train_epochs": 0.0}, {"rate": 1.0}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ARGUMENTS.items() for value in values]
)
def test_an_argument_out_of_range_is_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=name):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("epochs", [0, -3])
def test_a_run_that_trains_nothing_is_refused(tmp_path: Path, epochs: int) -> None:
    with pytest.raises(ProblemError, match="num_train_epochs"):
        arguments(tmp_path, max_steps=-1, num_train_epochs=epochs)


@pytest.mark.parametrize(
    ("method", "named"),
    [("dart", "'darts'"), ("cg:step=5", "'steps'"), ("neumann:terms=-1", "terms")],
)
def test_an_estimator_that_is_not_known_as_it_is_written(
    tmp_path: Path, method: str, named: str
) -> None:
    with pytest.raises(ProblemError, match=named):
        arguments(tmp_path, hypergradient=method)


@pytest.mark.parametrize("method", ["unrolled:steps=2", "forward:carry=true"])
def test_the_trainer_records_one_lower_step(tmp_path: Path, method: str) -> None:
    named = rf"hypergradient: {method.partition(':')[0]} .* 1 of lower_steps=2; .*Engine"
    with pytest.raises(ProblemError, match=named):
        arguments(tmp_path, hypergradient=method, lower_steps=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", -1e-5),
        ("gamma", NAN),
        ("gamma", "small"),
        ("norm_grad", "no"),
        ("fast_dora", "no"),
    ],
)
def test_an_option_of_the_method_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=name):
        BiDoRA(**{name: value})


def frozen_magnitudes() -> Any:
    model = peft_model()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    return model


def for_inference(folder: Path) -> Any:
    peft_model().save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(base_model(), folder / "adapter")


class Quantised(nn.Linear):
    """What a quantised layer looks like: a forward of its own."""

    def forward(self, x: Any) -> Any:
        return super().forward(x)


class Linear8bitLt(Quantised):
    """What a layer that rounds its input looks like: known by its name."""


def quantised(kind: type[nn.Module] = Quantised) -> Any:
    base = base_model()
    for layer in base.bert.encoder.layer:
        old = layer.attention.self.query
        layer.attention.self.query = kind(old.in_features, old.out_features)
    return get_peft_model(base, LoraConfig(target_modules=["query", "value"], use_dora=True))


MODELS = {
    "no PeftModel": (lambda _: base_model(), {}, "peft_model: .*Bert"),
    "no magnitudes for bidora": (
        lambda _: peft_model(dora=False),
        {},
        r"query: .*'default'.*use_dora",
    ),
    "an adapter of another kind": (
        lambda _: get_peft_model(base_model(), IA3Config(target_modules=["key"])),
        {},
        "adapter 'default': ",
    ),
    "frozen magnitudes": (lambda _: frozen_magnitudes(), {}, "magnitude_vector"),
    "loaded for inference, bidora": (for_inference, {}, "is_trainable=True"),
    "quantised, cg": (
        lambda _: quantised(),
        {"hypergradient": "cg"},
        "hypergradient='cg'.*Quantised",
    ),
    "quantised, darts with an exact product": (
        lambda _: quantised(),
        {"hypergradient": "darts:product=exact"},
        "hypergradient='darts' .* choose product=difference",
    ),
    "in 8 bits, cg": (
        lambda _: quantised(Linear8bitLt),
        {"hypergradient": "cg"},
        "hypergradient='cg' .* choose direct",
    ),
    "in 8 bits, differences": (
        lambda _: quantised(Linear8bitLt),
        {"hypergradient": "darts"},
        "Linear8bitLt: .* choose product=exact, direct",
    ),
}


@pytest.mark.filterwarnings("ignore:use_fast_dora")
@cases(MODELS)
def test_models(case: Any, tmp_path: Path) -> None:
    make, settings, message = case
    with pytest.raises(ProblemError, match=message):
        trainer(tmp_path, model=make(tmp_path), **settings)


@pytest.mark.filterwarnings("ignore:use_fast_dora")
def test_a_base_that_cannot_be_read_is_trained_by_first_order_products(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=quantised(), hypergradient="cg:product=difference,steps=2")
    run.train()
    assert run.state.global_step == 6


@pytest.mark.parametrize("make", [TrainingArguments, dict])
def test_arguments_of_another_trainer(make: Any, tmp_path: Path) -> None:
    args = make(output_dir=str(tmp_path))
    message = f"args must be BilevelTrainingArguments, got {make.__name__}"
    with pytest.raises(ProblemError, match=message):
        BilevelTrainer(peft_model(), args, train_dataset=data())
