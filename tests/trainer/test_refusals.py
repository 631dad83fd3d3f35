"""What does not fit gets one error that names it, before anything has moved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, default_data_collator

from hyperopt_peft import BiDoRA, BilevelTrainer, Method, Problem, ProblemError, bilevel
from hyperopt_peft.problems import (
    ClassOffsets,
    FrequencyWeights,
    LayerScales,
    LogitAdjustment,
    LoRA,
    TunedAdjustment,
)
from hyperopt_peft.problems.bidora import Direction, Magnitude
from tests.support.adapted_models import Quantised
from tests.support.class_weights import Plain, pair
from tests.support.methods import RowWeights, method_trainer
from tests.support.trainers import arguments, base_model, data, peft_model, trainer

NAN = float("nan")
TRAIN, UPPER, EVAL = "train_dataset", "upper_dataset", "eval_dataset"
# Each argument that an error must name, with values that it refuses.
ARGUMENTS: dict[str, list[Any]] = {
    "lower_steps": [0, 1.5, True],
    "upper_learning_rate": ["1e-3", NAN, -1e-3],
    "learning_rate": [NAN],
    "weight_decay": [-0.1, float("inf")],
    "max_grad_norm": [-1.0],
    "per_device_train_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "upper_weight_decay": [-1.0],
    "upper_max_grad_norm": ["1"],
    "upper_prior": [-1.0, "1"],
    "per_device_upper_batch_size": [0],
    "seed": [-3, 2**32],
    "data_seed": [-3],
    "upper_fraction": [0.0, 20],
    "non_finite": ["ignore"],
    "hypergradient": [3, "unrolled:steps=2"],
    "retrain": [True],
    "num_train_epochs": [0],
    "retrain_arguments": [
        {"learning_rate": -1.0},
        {"learning_rate": "high"},
        {"num_train_epochs": 0.0},
        {"rate": 1.0},
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ARGUMENTS.items() for value in values]
)
def test_an_argument_out_of_range_is_named(tmp_path: Path, name: str, value: Any) -> None:
    steps = {"max_steps": -1} if name == "num_train_epochs" else {"lower_steps": 2}
    with pytest.raises(ProblemError, match=name):
        arguments(tmp_path, **{**steps, name: value})


@pytest.mark.parametrize(
    "options", [{"gamma": -1e-5}, {"gamma": NAN}, {"norm_grad": "no"}, {"fast_dora": "no"}], ids=str
)
def test_an_option_of_the_method_is_named(options: Any) -> None:
    with pytest.raises(ProblemError, match=next(iter(options))):
        BiDoRA(**options)


def rows(begin: int, end: int) -> Any:
    return data(rows=60).select(range(begin, end))


def labelled(labels: Any, names: str = "abc") -> Any:
    """Rows with other labels."""
    table = data(rows=len(labels)).remove_columns("labels")
    return table.add_column("labels", labels, feature=ClassLabel(names=list(names)))


APART = {"train_dataset": rows(0, 30), "upper_dataset": rows(30, 60)}
FOUR = labelled([row % 4 for row in range(16)], "abcd")
UNLABELLED = labelled([None, None, *data()["labels"][2:]])
WORDS = data().remove_columns("labels").add_column("label", ["good", "bad", "fair"] * 8)
TEXT = data().add_column("text", ["a"] * 24)
RAGGED = data(seed=4).map(
    lambda row, index: {"input_ids": row["input_ids"][: 5 + index % 2]}, with_indices=True
)
LONG = data(seed=4).map(
    lambda row, index: {"input_ids": row["input_ids"] * (86 if index == 1 else 1)},
    with_indices=True,
)


def rare(times: int) -> Any:
    """Class 2 in ``times`` of 48 rows only."""
    return labelled([2] * times + [row % 2 for row in range(48 - times)])


def as_tensors(examples: Any) -> Any:
    return {key: torch.tensor([row[key] for row in examples]) for key in examples[0]}


def made(options: Any = None, **settings: Any) -> Any:
    """Making a trainer of BiDoRA."""
    return lambda m, f: trainer(f, model=m, options=options, **settings)


def trained(options: Any = None, resume: Any = None, **settings: Any) -> Any:
    """Training it."""
    return lambda m, f: made(options, **settings)(m, f).train(resume)


def groups(model: Any) -> Any:
    levels = Direction(model), Magnitude(model)
    return [{"params": level.variables} for level in levels]


def adam(*parts: Any) -> Any:
    return torch.optim.Adam(parts)


def of_levels(options: Any = lambda _: {}, *, settings: Any = None, **level: Any) -> Any:
    """Making a trainer of the levels of BiDoRA, with ``options`` of the model."""

    def act(model: Any, folder: Path) -> Any:
        levels = {"lower": Direction(model, **level), "upper": Magnitude(model)}
        given = {"args": arguments(folder, **(settings or {})), **APART, **options(model)}
        return BilevelTrainer(**{"model": model, **levels, **given})

    return act


def with_optimizer(make: Any, schedule: Any = lambda _: None) -> Any:
    """Making a trainer with an optimizer, of the groups of both levels, and a scheduler."""
    return of_levels(lambda m: {"optimizers": (make(groups(m)), schedule(groups(m)))})


class Half(Problem):
    """Owns what another level owns too."""


def layer_wise(model: Any) -> None:
    """A function that makes an optimizer of a whole model."""


def on_two_gpus(model: Any, folder: Path) -> Any:
    args = arguments(folder)
    args._n_gpu = 2  # as on a machine with two, without torchrun
    return of_levels(lambda _: {"args": args})(model, folder)


def below_a_file(model: Any, folder: Path) -> Any:
    (folder / "file").touch()
    return trainer(folder / "file" / "below", model=model, save_strategy="steps")


class Linear8bitLt(Quantised):
    """What a layer that rounds its input looks like: known by its name."""


def quantised(kind: type[nn.Module]) -> Any:
    base = base_model()
    for layer in base.bert.encoder.layer:
        old = layer.attention.self.query
        layer.attention.self.query = kind(old.in_features, old.out_features)
    return get_peft_model(base, LoraConfig(target_modules=["query", "value"], use_dora=True))


def over(kind: type[nn.Module], estimator: str) -> Any:
    return lambda _, f: trainer(f, model=quantised(kind), hypergradient=estimator)


class Doubled(Trainer):
    """A loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return 2 * super().compute_loss(model, inputs, *args, **options)


class Stepping(Trainer):
    """A step of its own, which makes ``calls`` calls of the Trainer's."""

    steps = 1

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self.changed(dict(inputs))
        losses = [super(Stepping, self).training_step(model, inputs) for _ in range(self.steps)]
        return sum(losses, torch.zeros(()))

    def changed(self, inputs: Any) -> Any:
        return inputs


class Shuffled(Stepping):
    """Its step changes the batch in place."""

    def changed(self, inputs: Any) -> Any:
        inputs["input_ids"].copy_(inputs["input_ids"].flip(-1))
        return inputs


class Dropped(Stepping):
    """Its step gives the model a part of the batch."""

    def changed(self, inputs: Any) -> Any:
        return {**inputs, "labels": inputs["labels"].clone()}


def stepping(kind: type[Trainer] = Stepping, **attributes: Any) -> Any:
    """Training over a trainer with a step of its own."""
    return by_method(LoRA, kind=bilevel(type(kind.__name__, (kind,), attributes)))


class Reads(Method):
    """Reads the column quality before training, and as a tag in the upper loss."""

    def __init__(self, *tags: str) -> None:
        self.tags = tags

    def upper_variables(self, model: Any) -> Any:
        return {n: x for n, x in model.named_parameters() if x.requires_grad and "bias" in n}

    def read_rows(self, model: Any, rows: Any, collate: Any) -> None:
        collate([rows[0]])["quality"]

    def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return task_loss(batch) * batch["quality"].mean()


def qualities(values: Any, *tags: str, **more: Any) -> Any:
    """Training by `Reads` on rows whose column quality has these ``values``."""
    rows = {TRAIN: data().add_column("quality", values * 12), **more}
    return by_method(partial(Reads, *tags), rows)


class Idle(Plain):
    """Owns a variable too that no loss reads."""

    def __init__(self, model: Any, weight: Any) -> None:
        self.model = model
        Problem.__init__(self, {"weight": weight, "idle": torch.ones(2, requires_grad=True)})


class Pulled(Plain):
    """The upper level with a prior of its own."""

    def __init__(self, model: Any, weight: Any) -> None:
        super().__init__(model, weight, prior=1.0)


def of_method(method: type[Method], options: Any = None, **settings: Any) -> Any:
    """Making a trainer of a method."""
    return lambda _, f: method_trainer(f, method=method(), options=options, **settings)


def by_method(*args: Any, **settings: Any) -> Any:
    """Training by a method."""
    return lambda m, f: of_method(*args, **settings)(m, f).train()


def order_of(kind: type[Method]) -> Any:
    """Training with a collator that puts its longest row first."""
    mask = [[1] * (1 + row % 6) + [0] * (5 - row % 6) for row in range(24)]
    rows = data().remove_columns("attention_mask").add_column("attention_mask", mask)
    sort = lambda rows: sorted(rows, key=lambda row: -sum(row["attention_mask"]))  # noqa: E731
    options = {TRAIN: rows, "data_collator": lambda rows: default_data_collator(sort(rows))}
    return by_method(kind, options)


def compiled(model: Any, folder: Path, method: Method) -> None:
    model = torch.compile(model, backend="eager")
    BilevelTrainer(model, arguments(folder), method=method, train_dataset=data()).train()


METHODS = (LoRA, RowWeights, LayerScales)
AGAIN, OTHERS = data().select([1, 2]), data(rows=6, seed=1)
STREAM, EACH_EPOCH = data().to_iterable_dataset(), {"save_strategy": "epoch"}
INDEXED = data().add_column("index", list(range(1000, 1024)))
SPLIT = "upper_fraction: cannot hold out 20% of"
SMOOTH = {"label_smoothing_factor": 0.01}
LOSS = {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}
SEVEN = [torch.zeros(7)]
CHECKPOINTED = {"use_reentrant": True}
REFUSED: list[tuple[str, Any]] = [
    # Data.
    ("train_dataset: there is none", made({TRAIN: None})),
    ("train_dataset has no examples", made({TRAIN: rows(0, 0)})),
    ("one data set, got a DatasetDict; .*_dataset.", made({TRAIN: DatasetDict(train=data())})),
    ("must be one data set, got a str", made({TRAIN: "imdb"})),
    ("only a datasets.Dataset can be split, got list; .*upper", made({TRAIN: list(data())})),
    ("label.*class_encode_column", made({TRAIN: WORDS})),
    ("2 of 24 training examples have no label; remove them", made({TRAIN: UNLABELLED})),
    (f"{SPLIT} 1 different rows", made({TRAIN: rows(0, 1)})),
    (f"{SPLIT} 48 different rows: the class .* has 1 row", made({TRAIN: rare(1)})),
    ("class 2 has only 2 examples, .*change upper_fraction", made({TRAIN: rare(2)})),
    ("no column in common", made({**APART, UPPER: Dataset.from_dict({"text": ["a", "b"]})})),
    ("30 of 30 .*upper_dataset are in train", made({**APART, UPPER: APART[TRAIN]})),
    ("eval_dataset is given as the upper level's", made({**APART, EVAL: APART[UPPER]})),
    ("eval_dataset is given", made({**APART, EVAL: {"a": data(seed=5), "b": APART[UPPER]}})),
    ("labels.*num_labels=4", made({TRAIN: FOUR})),
    ("labels.*num_labels=4", made({EVAL: FOUR})),
    ("row 1 has 516 tokens, and the model positions for 512", made({TRAIN: LONG})),
    ("row 1 has 516 tokens", made({**APART, UPPER: LONG})),
    ("train_dataset: No columns", made({TRAIN: Dataset.from_dict({"text": list("abcdefghij")})})),
    ("dataloader_drop_last", made(per_device_train_batch_size=20, dataloader_drop_last=True)),
    ('save_strategy: a stream.*"steps"', made({TRAIN: STREAM, UPPER: OTHERS}, **EACH_EPOCH)),
    ("upper_dataset.*Iterable", of_levels(lambda _: {UPPER: data().to_iterable_dataset()})),
    ("upper_dataset", of_levels(lambda _: {"upper": None})),
    ("batch with .*'input_ids'.*labels", trained({TRAIN: data().remove_columns("labels")})),
    ("batch with .*Target 3", trained({TRAIN: FOUR, "data_collator": as_tensors})),
    ("train_dataset.*DataCollatorWithPadding", trained({TRAIN: RAGGED})),
    ("upper_dataset.*WithPadding", trained({**APART, UPPER: RAGGED}, lower_steps=1)),
    (
        "train_dataset.*text columns",
        trained({TRAIN: TEXT, "data_collator": as_tensors}, remove_unused_columns=False),
    ),
    # Rows that a method numbers, joins or repeats, and tags.
    *(("2 of 2 .*upper_dataset are in train", of_method(x, {UPPER: AGAIN})) for x in METHODS),
    *(("eval_dataset is given", of_method(x, {UPPER: OTHERS, EVAL: OTHERS})) for x in METHODS),
    ("index: this name is reserved", of_method(RowWeights, {TRAIN: INDEXED})),
    (
        "Reads.upper_loss: reads the tag 'quality', a column that upper_dataset",
        qualities([1.0, 2.0], "quality", upper_dataset=data(rows=5, seed=1)),
    ),
    ("quality: is None in row 1 ", qualities([1.0, None], "quality")),
    ("quality: is 'good' in row 0 ", qualities(["good", "bad"], "quality")),
    ("quality: .*None.* in row 1 ", qualities([[1.0], [2.0, None]], "quality")),
    ("Reads.read_rows: reads 'quality'.* name the column in tags", qualities([1.0, 2.0])),
    ("data_collator: returns its rows in another order", order_of(RowWeights)),
    # Models.
    ("peft_model: .*Bert", lambda _, f: trainer(f, model=base_model())),
    ("query: .*'default'.*use_dora", lambda _, f: trainer(f, model=peft_model(dora=False))),
    ("hypergradient='cg'.*Quantised", over(Quantised, "cg")),
    ("'darts' .* choose product=difference", over(Quantised, "darts:product=exact")),
    ("hypergradient='cg' .* choose direct", over(Linear8bitLt, "cg")),
    ("Linear8bitLt: .* choose product=exact, direct", over(Linear8bitLt, "darts")),
    # Settings.
    ("args must be BilevelTrainingArguments, got dict", of_levels(lambda _: {"args": {}})),
    ("model must be a .*Module, got str", of_levels(lambda _: {"model": "name"})),
    ("model must be a .*Module, got str", of_method(LoRA, kind=bilevel(Doubled), model="name")),
    ("Own: Stepping overrides .*bilevel", lambda *_: type("Own", (BilevelTrainer, Stepping), {})),
    ("Stepping must call super.* once", stepping(steps=0)),
    ("Stepping must call super.* once", stepping(steps=2)),
    ("Shuffled must .*batch unchanged", stepping(Shuffled)),
    ("Dropped must .*batch unchanged", stepping(Dropped)),
    (
        "hyperparameter_search: .*compare_methods.* Choice",
        lambda m, f: trainer(f, model=m).hyperparameter_search(n_trials=1),
    ),
    ("subclass of transformers.Trainer, got Module", lambda *_: bilevel(nn.Module)),
    ("got 'SFTTrainer'", lambda *_: bilevel("SFTTrainer")),
    ("n_gpu", on_two_gpus),
    ("auto_find_batch_size", of_levels(settings={"auto_find_batch_size": True})),
    ("model_init", of_levels(lambda _: {"model_init": peft_model})),
    ("compute_loss_func: Dir", lambda m, f: of_levels(lambda _: LOSS)(m, f).train()),
    ("label_smoothing_factor: ClassOffsets.* task_loss", by_method(ClassOffsets, **SMOOTH)),
    ("label_smoothing_factor: LogitAdjustment", by_method(LogitAdjustment, **SMOOTH)),
    ("label_smoothing_factor: RowWeights", by_method(RowWeights, **SMOOTH)),
    ("compute_loss_func: FrequencyWeights", by_method(FrequencyWeights, LOSS)),
    ("compute_loss: TunedAdjustment", by_method(TunedAdjustment, kind=bilevel(Doubled))),
    *(
        (r"model: torch.compile.*model\.compile", lambda m, f, x=x: compiled(m, f, x))
        for x in (BiDoRA(), LoRA())
    ),
    ("torch_compile", of_levels(settings={"torch_compile": True})),
    ("lower_steps", trained(max_steps=3, lower_steps=4)),
    ("lower_steps", trained(max_steps=-1, num_train_epochs=2, lower_steps=11)),
    (
        "use_reentrant",
        trained(gradient_checkpointing=True, gradient_checkpointing_kwargs=CHECKPOINTED),
    ),
    ("output_dir: .* is not a writable folder", below_a_file),
    ("no complete checkpoint", trained(resume=True)),
    ("nowhere", trained(resume="nowhere")),
    # Levels.
    ("level must be a Problem, got PeftModel", of_levels(lambda m: {"upper": m})),
    ("Half: has no variables", of_levels(lambda _: {"upper": Half.__new__(Half)})),
    ("Direction", of_levels(data=[{}])),
    ("max_grad_norm", of_levels(max_grad_norm=1.0)),
    ("Direction.*Half|Half.*Dir", of_levels(lambda m: {"upper": Half(Direction(m).variables[:1])})),
    ("Idle.*'idle'", lambda _, f: pair(f, upper=Idle, lower_steps=1)[0].train()),
    ("upper_prior", lambda _, f: pair(f, upper=Pulled, upper_prior=2.0)),
    ("method: ", lambda m, f: made({"upper": Magnitude(m)})(m, f)),
    ("upper_variables: ", of_method(type("Own", (LayerScales,), {"prepare": Method.prepare}))),
    ("source: ", of_method(type("Own", (RowWeights,), {"tags": ("source",)}))),
    ("'darts'", lambda _, f: arguments(f, hypergradient="dart")),
    ("upper_fraction", lambda _, f: arguments(f).with_defaults({"upper_fraction": 2.0})),
    # Optimizers.
    ("magnitude.* shape none", with_optimizer(lambda g: adam(g[0]))),
    (r"optimizers.*none.*\(7,\)", with_optimizer(lambda g: adam(*g, {"params": SEVEN}))),
    (
        "optimizers.*group",
        with_optimizer(lambda g: adam({"params": g[0]["params"] + g[1]["params"]})),
    ),
    (
        "optimizers.*scheduler",
        with_optimizer(lambda g: adam(*g), lambda g: torch.optim.lr_scheduler.ConstantLR(adam(*g))),
    ),
    ("AdamW.*1.5", made(adam_beta1=1.5)),
    ("Adafactor", made(hypergradient="sama", optim="adafactor")),
    ("Adafactor", made(hypergradient="unrolled:steps=1", optim="adafactor")),
    ("layer_wise", made({"optimizer_cls_and_kwargs": (layer_wise, {})})),
    (
        "SGD takes no groups",
        made({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"optimizer_dict": {}})}),
    ),
]


@pytest.mark.filterwarnings("ignore:use_fast_dora")
@pytest.mark.parametrize(("message", "act"), REFUSED)
def test_it_is_refused_and_nothing_has_moved(message: str, act: Any, tmp_path: Path) -> None:
    model = peft_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ProblemError, match=message):
        act(model, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_step_outside_of_training_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    for _ in range(2):
        with pytest.raises(ProblemError, match=r"training_step: .*call train\(\)"):
            run.training_step(run.model, batch)
        run.train()


def folded(examples: Any) -> Any:
    batch = as_tensors(examples)
    return {**batch, "labels": batch["labels"] % 3}


@pytest.mark.filterwarnings("ignore:use_fast_dora")
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        # The training set itself, for a measure of the fit; labels that a collator changes.
        ({TRAIN: (table := data()), EVAL: table}, {}),
        ({TRAIN: FOUR, "data_collator": folded}, {}),
        # 24 examples give the lower level 19.
        ({}, {"per_device_train_batch_size": 19, "dataloader_drop_last": True}),
        # A base that cannot be read.
        ({"model": quantised(Quantised)}, {"hypergradient": "cg:product=difference,steps=2"}),
    ],
)
def test_what_is_near_is_not_refused(tmp_path: Path, options: Any, settings: Any) -> None:
    options = dict(options)
    run = trainer(tmp_path, model=options.pop("model", None), options=options, **settings)
    run.train()
    assert run.state.global_step == 6
