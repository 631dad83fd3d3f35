"""Bad settings, data, models and levels get one error that names them, before anything moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from hyperopt_peft import BiDoRA, BilevelTrainer, NonFiniteError, Problem, ProblemError
from hyperopt_peft.problems.bidora import Direction, Magnitude
from tests.support.class_weights import Plain, Weighted, pair
from tests.support.trainers import arguments, base_model, data, peft_model, trainer, values

NAN, INFINITE = float("nan"), float("inf")
#: Each argument that an error must name, with values that it refuses.
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


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hypergradient": "dart"}, "'darts'"),
        ({"hypergradient": "cg:step=5"}, "'steps'"),
        ({"hypergradient": "neumann:terms=-1"}, "terms"),
        ({"hypergradient": "unrolled:steps=2"}, r"unrolled .* 1 of lower_steps=2; .*Engine"),
        ({"hypergradient": "forward:carry=true"}, r"forward .* 1 of lower_steps=2; .*Engine"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path: Path, settings: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", -1e-5), ("gamma", "small"), ("norm_grad", "no"), ("gamma", NAN)]
)
def test_an_option_of_the_method_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=name):
        BiDoRA(**{name: value})


def rows(begin: int, end: int) -> Any:
    return data(rows=60).select(range(begin, end))


APART = {"train_dataset": rows(0, 30), "upper_dataset": rows(30, 60)}


def labelled(labels: list[Any], names: str = "abc") -> Any:
    """Rows with these classes."""
    table = data(rows=len(labels)).remove_columns("labels")
    return table.add_column("labels", labels, feature=ClassLabel(names=list(names)))


def rare(times: int) -> Any:
    """Class c in ``times`` of 48 rows only."""
    return labelled([2] * times + [row % 2 for row in range(48 - times)])


def again(table: Any) -> Any:
    """The same rows in another object with another fingerprint, columns in another order."""
    columns = table.column_names[::-1]
    copied = Dataset.from_dict({c: table[c][:] for c in columns}, features=table.features)
    return copied.select(range(len(copied))[::-1]).select_columns(columns)


def ragged() -> Any:
    """Rows of two lengths."""
    lengths = lambda row, index: {"input_ids": row["input_ids"][: 5 + index % 2]}  # noqa: E731
    return data(seed=4).map(lengths, with_indices=True)


def as_tensors(examples: Any) -> Any:
    return {key: torch.tensor([row[key] for row in examples]) for key in examples[0]}


FOUR = labelled([0, 1, 2, 3] * 4, "abcd")
#: Options and settings of a trainer that is refused when it is made.
MADE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no data": ({"train_dataset": None}, {}, "train_dataset: there is none"),
    "empty": ({"train_dataset": rows(0, 0)}, {}, "train_dataset has no examples"),
    "all splits": (
        {"train_dataset": DatasetDict(train=data())},
        {},
        r'must be one data set, got a DatasetDict; .*train_dataset\["train"\]',
    ),
    "a list to split": (
        {"train_dataset": list(data())},
        {},
        "only a datasets.Dataset can be split, got list; .*upper_dataset",
    ),
    "labels that are text": (
        {"train_dataset": data().remove_columns("labels").add_column("label", ["a", "b"] * 12)},
        {},
        "label.*class_encode_column",
    ),
    "labels that are missing": (
        {"train_dataset": labelled([None, None, *[1, 2] * 11])},
        {},
        "2 of 24 training examples have no label; remove them",
    ),
    "too few": ({"train_dataset": rows(0, 1)}, {}, "cannot give 20% of 1 training examples"),
    "a class with one row": ({"train_dataset": rare(1)}, {}, "20% of 48 .*least populated class"),
    "a class that is not above": (
        {"train_dataset": rare(2)},
        {},
        "class 2 has only 2 examples, and the upper level would get none; change upper_fraction",
    ),
    "no common columns": (
        {**APART, "upper_dataset": Dataset.from_dict({"text": ["a", "b"]})},
        {},
        "train_dataset and upper_dataset have no column in common",
    ),
    "overlap": (
        {"train_dataset": rows(0, 30), "upper_dataset": again(rows(27, 60))},
        {},
        "3 of 33 examples of upper_dataset are in train_dataset too",
    ),
    "one of the evaluation sets": (
        {**APART, "eval_dataset": {"a": data(seed=5), "b": APART["upper_dataset"]}},
        {},
        "eval_dataset is given as the upper level's data",
    ),
    "more classes than outputs": ({"train_dataset": FOUR}, {}, "labels.*num_labels=4"),
    "columns of another model": (
        {"train_dataset": Dataset.from_dict({"text": ["a"] * 10})},
        {},
        "train_dataset: No columns in the dataset match",
    ),
    "no batch is left": (
        {},
        {"per_device_train_batch_size": 20, "dataloader_drop_last": True},
        "dataloader_drop_last",
    ),
    "options of another optimizer": (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"beta": 0.9})},
        {},
        "SGD.*beta",
    ),
    "an optimizer out of range": ({}, {"adam_beta1": 1.5}, "AdamW.*1.5"),
    "a step without a derivative": (
        {},
        {"hypergradient": "sama", "optim": "adafactor"},
        "Adafactor",
    ),
    "an optimizer of the model": (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"optimizer_dict": {}})},
        {},
        "SGD takes no groups",
    ),
}


def refuses(error: Any, message: str, model: nn.Module, act: Any) -> None:
    """``act`` raises ``error`` with ``message``, and ``model`` is what it was."""
    before = values(model)
    with pytest.raises(error, match=message):
        act()
    after = values(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("options", "settings", "message"), MADE.values(), ids=MADE)
def test_data_and_optimizers(tmp_path: Path, options: Any, settings: Any, message: str) -> None:
    model = peft_model()
    make = lambda: trainer(tmp_path, model=model, options=options, **settings)  # noqa: E731
    refuses(ProblemError, message, model, make)


@pytest.mark.filterwarnings("ignore:use_fast_dora")
def test_what_looks_alike_is_taken(tmp_path: Path) -> None:
    """The training set as evaluation set, labels that a collator changes, one whole batch."""
    table = data()
    trainer(tmp_path, options={"train_dataset": table, "eval_dataset": table})

    def folded(examples: Any) -> Any:
        batch = as_tensors(examples)
        return {**batch, "labels": batch["labels"] % 3}

    for options, settings in (
        ({"train_dataset": FOUR, "data_collator": folded}, {}),
        ({}, {"per_device_train_batch_size": 19, "dataloader_drop_last": True}),
        ({}, {"model": quantised(), "hypergradient": "cg:product=difference,steps=2"}),
    ):
        run = trainer(tmp_path, options=options, **settings)
        run.train()
        assert run.state.global_step == 6


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


def frozen_magnitudes() -> Any:
    model = peft_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("magnitude" not in name)
    return model


def for_inference(folder: Path) -> Any:
    peft_model().save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(base_model(), folder / "adapter")


def ia3() -> Any:
    return get_peft_model(base_model(), IA3Config(target_modules=["key"]))


MODELS: list[tuple[Any, str, str]] = [
    (lambda _: base_model(), "direct", "peft_model: .*Bert"),
    (lambda _: peft_model(dora=False), "direct", r"query: .*'default'.*use_dora"),
    (lambda _: ia3(), "direct", "adapter 'default': "),
    (lambda _: frozen_magnitudes(), "direct", "magnitude_vector"),
    (for_inference, "direct", "is_trainable=True"),
    (lambda _: quantised(), "cg", "hypergradient='cg'.*Quantised"),
    (lambda _: quantised(), "darts:product=exact", "'darts' .* choose product=difference"),
    (lambda _: quantised(Linear8bitLt), "cg", "hypergradient='cg' .* choose direct"),
    (lambda _: quantised(Linear8bitLt), "darts", "Linear8bitLt: .* choose product=exact, direct"),
]


@pytest.mark.filterwarnings("ignore:use_fast_dora")
@pytest.mark.parametrize(("make", "estimator", "message"), MODELS)
def test_models(tmp_path: Path, make: Any, estimator: str, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        trainer(tmp_path, model=make(tmp_path), hypergradient=estimator)


class Unsized(torch.utils.data.Dataset):
    """Examples by index, without a length."""

    def __getitem__(self, index: Any) -> Any:
        return data()[index]


class Half(Problem):
    """Owns what another level owns too."""


def levels(model: nn.Module, **options: Any) -> dict[str, Any]:
    return {"lower": Direction(model, **options), "upper": Magnitude(model)}


def adamw(model: Any, *more: Any) -> Any:
    groups = [{"params": level.variables} for level in levels(model).values()]
    return torch.optim.AdamW([*groups, *({"params": [x]} for x in more)], 1e-3)


def in_one_group(model: Any) -> Any:
    return torch.optim.AdamW([v for x in levels(model).values() for v in x.variables])


def of_lower(model: Any) -> Any:
    return torch.optim.AdamW(Direction(model).variables)


def on_two_gpus(folder: Path) -> Any:
    args = arguments(folder)
    args._n_gpu = 2  # as on a machine with two, without torchrun
    return args


def with_schedule(model: Any) -> Any:
    return adamw(model), torch.optim.lr_scheduler.ConstantLR(adamw(model))


LEVELS: list[tuple[Any, str]] = [
    (lambda m, f: {"args": TrainingArguments(str(f), report_to="none")}, "args must be Bilevel"),
    (lambda m, f: {"args": {"lower_steps": 2}}, "args must be BilevelTrainingArguments, got dict"),
    (lambda m, f: {"args": on_two_gpus(f)}, "n_gpu"),
    (lambda m, f: {"args": arguments(f, auto_find_batch_size=True)}, "auto_find_batch_size"),
    (lambda m, f: {"model_init": peft_model}, "model_init"),
    (lambda m, f: {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func"),
    (lambda m, f: {"args": arguments(f, label_smoothing_factor=0.1)}, "label_smoothing_factor"),
    (lambda m, f: {"args": arguments(f, torch_compile=True)}, "torch_compile"),
    (lambda m, f: {"model": "bert"}, r"model must be a torch\.nn\.Module"),
    (lambda m, f: {"upper": m}, "a level must be a Problem, got PeftModel"),
    (lambda m, f: {"upper": Half.__new__(Half)}, "Half: has no variables"),
    (lambda m, f: levels(m, data=[{}]), "Direction"),
    (lambda m, f: levels(m, optimizer=of_lower(m)), "Direction"),
    (lambda m, f: levels(m, max_grad_norm=1.0), "max_grad_norm"),
    (lambda m, f: {"upper": Half(Direction(m).variables[:1])}, "Direction.*Half|Half.*Direction"),
    (lambda m, f: {"upper": None}, "upper_dataset"),
    (lambda m, f: {"upper_dataset": data().to_iterable_dataset()}, "upper_dataset.*Iterable"),
    (lambda m, f: {"upper_dataset": Unsized()}, "upper_dataset.*Unsized"),
    (lambda m, f: {"optimizers": (of_lower(m), None)}, "optimizers.*magnitude.* shape none"),
    (lambda m, f: {"optimizers": (adamw(m, torch.zeros(7)), None)}, r"optimizers.*none.*\(7,\)"),
    (lambda m, f: {"optimizers": (in_one_group(m), None)}, "optimizers.*group"),
    (lambda m, f: {"optimizers": with_schedule(m)}, "optimizers.*scheduler"),
]


@pytest.mark.parametrize(("make", "message"), LEVELS)
def test_levels_and_arguments(tmp_path: Path, make: Any, message: str) -> None:
    model = peft_model()
    given = {"model": model, **levels(model), "args": arguments(tmp_path), **APART}
    act = lambda: BilevelTrainer(**{**given, **make(model, tmp_path)})  # noqa: E731
    refuses(ProblemError, message, model, act)


class Idle(Plain):
    """Owns a variable too that no loss reads."""

    def __init__(self, model: Any, weight: Any) -> None:
        self.model = model
        Problem.__init__(self, {"weight": weight, "idle": torch.ones(2, requires_grad=True)})


class PerExample(Weighted):
    """Its loss has an entry for each example."""

    def loss(self, batch: Any) -> Any:
        return self.model(**batch)["logits"].sum(1)


class Infinite(Weighted):
    """The root of 0 has no derivative."""

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) + (self.variables[0][0, 0] * 0).sqrt()


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ({"upper": Idle}, ProblemError, "Idle.*'idle'"),
        ({"lower": PerExample}, ProblemError, r"PerExample.*\(8,\)"),
        ({"lower": Infinite}, NonFiniteError, "step 1 .*gradient.*checkpoint-0"),
    ],
)
def test_losses(levels: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    run, _ = pair(tmp_path, lower_steps=1, **levels)
    refuses(error, message, run.model, run.train)


TEXT = {"train_dataset": data().add_column("text", ["a"] * 24), "data_collator": as_tensors}
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
#: Options and settings of a trainer that is refused when training begins.
TRAINING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"train_dataset": data().remove_columns("labels")}, {}, "batch of .*'input_ids'.*labels"),
    ({"train_dataset": FOUR, "data_collator": as_tensors}, {}, "batch of .*Target 3"),
    ({"train_dataset": ragged()}, {}, "train_dataset.*DataCollatorWithPadding"),
    (TEXT, {"remove_unused_columns": False}, "train_dataset.*columns of text"),
    (
        {**APART, "upper_dataset": ragged()},
        {"lower_steps": 1},
        "upper_dataset.*DataCollatorWithPadding",
    ),
    ({}, {"max_steps": 3, "lower_steps": 4}, "lower_steps"),
    ({}, {"max_steps": -1, "num_train_epochs": 2, "lower_steps": 11}, "lower_steps"),
    ({}, {"gradient_checkpointing": True, **REENTRANT}, "use_reentrant"),
]


@pytest.mark.parametrize(("options", "settings", "message"), TRAINING)
def test_the_beginning_of_training(
    tmp_path: Path, options: Any, settings: Any, message: str
) -> None:
    run = trainer(tmp_path, options=options, **settings)
    refuses(ProblemError, message, run.model, run.train)
    assert run.state.global_step == 0


def test_steps_and_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run")
    for resume, message in ((True, "no complete checkpoint"), ("nowhere", "nowhere")):
        with pytest.raises(ProblemError, match=message):
            run.train(resume_from_checkpoint=resume)
    batch = next(iter(run.get_train_dataloader()))
    with pytest.raises(ProblemError, match=r"training_step: .*call train\(\)"):
        run.training_step(run.model, batch)
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(ProblemError, match=f"output_dir: {file} is no folder to write to"):
            trainer(folder, save_strategy="steps")
