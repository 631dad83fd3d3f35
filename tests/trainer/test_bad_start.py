"""What shows only when training begins is refused before anything has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Value
from torch import nn

from hyperopt_peft import BilevelTrainer, NonFiniteError, Problem, ProblemError
from tests.support.refusals import APART, cases, refuses, relabelled
from tests.support.trainers import arguments, data, peft_model, trainer


class Fading(nn.Module):
    """A model whose loss is ``form`` of its outputs."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.ones(6))
        self.scale = nn.Parameter(torch.ones(6))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        return {"loss": self.form(input_ids * self.weight, self.scale)}


class Own(Problem):
    """The model's own loss."""

    def __init__(self, model: Any, *variables: Any, name: Any = None) -> None:
        self.model = model
        named = dict(model.named_parameters())
        super().__init__([(key, named[key]) for key in variables], name=name)

    def loss(self, batch: Any) -> Any:
        return self.model(**batch)


def product(y: Any, scale: Any) -> Any:
    return (y * scale).square().mean()


LEVELS = {
    "a lower variable that no loss reads": (
        product,
        {"lower": ("weight", "idle"), "upper": ("scale",)},
        ProblemError,
        "lower.*'idle'",
    ),
    "an upper variable that no loss reads": (
        product,
        {"lower": ("weight",), "upper": ("scale", "idle")},
        ProblemError,
        "upper.*'idle'",
    ),
    "a loss for every example": (
        lambda y, scale: (y * scale).mean(1),
        {},
        ProblemError,
        r"lower.*\(4,\)",
    ),
    "a loss that is a number": (
        lambda y, scale: product(y, scale).item(),
        {},
        ProblemError,
        "lower.*float",
    ),
    "a loss that is cut off": (
        lambda y, scale: product(y, scale).detach(),
        {},
        ProblemError,
        "lower.*detach",
    ),
    "a loss that is NaN": (
        lambda y, scale: product(y, scale) * float("nan"),
        {},
        NonFiniteError,
        "step 1 .*nan.*checkpoint-0",
    ),
    "a gradient that is infinite": (
        lambda y, scale: product(y, scale) + (y[0, 0] * 0).sqrt() * 0,
        {},
        NonFiniteError,
        "step 1 .*lower.*gradient",
    ),
}


@cases(LEVELS)
def test_losses(case: Any, tmp_path: Path) -> None:
    form, owned, error, message = case
    owned = {"lower": ("weight",), "upper": ("scale",), **owned}
    model = Fading(form)
    parts = {name: Own(model, *variables, name=name) for name, variables in owned.items()}
    args = arguments(tmp_path, lower_steps=1)
    run = BilevelTrainer(model, **parts, args=args, **APART)
    refuses(error, message, model, run.train)


def step(*, options: Any = None, **settings: Any) -> Any:
    """A `BiDoRATrainer` that is built without an error."""
    return lambda model, folder: trainer(folder, model=model, options=options, **settings)


def layer_wise(model: Any) -> None:
    """A function that makes an optimizer of a whole model."""


def as_tensors(examples: Any) -> Any:
    return {key: torch.tensor([row[key] for row in examples]) for key in examples[0]}


def ragged() -> Any:
    """Other examples than `data`'s, of two lengths."""
    table = data(seed=4)
    lengths = lambda row, index: {"input_ids": row["input_ids"][: 5 + index % 2]}  # noqa: E731
    return table.map(lengths, with_indices=True)


TEXT = data().add_column("text", ["a"] * 24)
UNKNOWN = {"train_dataset": relabelled(["a", "b", "c", "d"]), "data_collator": as_tensors}


TRAINING = {
    "no labels": (
        step(options={"train_dataset": data().remove_columns("labels")}),
        {},
        "batch of .*'input_ids'.*labels",
    ),
    "labels without an output": (step(options=UNKNOWN), {}, "batch of .*Target 3"),
    "labels that are no classes": (
        step(options={"train_dataset": data().cast_column("labels", Value("float32"))}),
        {},
        "batch of .*Target size",
    ),
    "tokens outside the vocabulary": (
        step(options={"train_dataset": data().map(lambda row: {"input_ids": [50] * 6})}),
        {},
        "batch of .*index out of range",
    ),
    "examples of different length": (
        step(options={"train_dataset": ragged()}),
        {},
        "train_dataset.*DataCollatorWithPadding",
    ),
    "text beside tokens": (
        step(
            options={"train_dataset": TEXT, "data_collator": as_tensors},
            remove_unused_columns=False,
        ),
        {},
        "train_dataset.*columns of text",
    ),
    "an upper set of different length": (
        step(options={**APART, "upper_dataset": ragged()}, lower_steps=1),
        {},
        "upper_dataset.*DataCollatorWithPadding",
    ),
    "more lower steps than steps": (step(max_steps=3, lower_steps=4), {}, "lower_steps"),
    "more lower steps than the epochs have": (
        step(max_steps=-1, num_train_epochs=2, lower_steps=11),
        {},
        "lower_steps",
    ),
    "checkpointing that hides variables": (
        step(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        {},
        "use_reentrant",
    ),
    "nothing to resume from": (step(), {"resume_from_checkpoint": True}, "no complete checkpoint"),
    "no such checkpoint": (step(), {"resume_from_checkpoint": "nowhere"}, "nowhere"),
}


# What can be known when the trainer is made.
OPTIMIZERS = {
    "options of another": (
        {"options": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"beta": 0.9})}},
        "SGD.*beta",
    ),
    "options out of range": ({"adam_beta1": 1.5}, "AdamW.*1.5"),
    "a step that sama does not know": (
        {"hypergradient": "sama", "optim": "adafactor"},
        "Adafactor",
    ),
    "a step that cannot be unrolled": (
        {"hypergradient": "unrolled:steps=1", "optim": "adafactor"},
        "Adafactor",
    ),
    "one that chooses its parameters": (
        {"options": {"optimizer_cls_and_kwargs": (layer_wise, {})}},
        "layer_wise",
    ),
    "one that takes the model": (
        {"options": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"optimizer_dict": {}})}},
        "SGD takes no groups",
    ),
}


@cases(OPTIMIZERS)
def test_an_optimizer_is_refused_before_training(case: Any, tmp_path: Path) -> None:
    settings, message = case
    model = peft_model()
    refuses(ProblemError, message, model, lambda: trainer(tmp_path, model=model, **settings))


@cases(TRAINING)
def test_the_beginning_of_training(case: Any, tmp_path: Path) -> None:
    make, options, message = case
    model = peft_model()
    run = make(model, tmp_path)
    refuses(ProblemError, message, model, lambda: run.train(**options))
    assert run.state.global_step == 0


def test_a_step_outside_of_training_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    for _ in range(2):
        with pytest.raises(ProblemError, match=r"training_step: .*call train\(\)"):
            run.training_step(run.model, batch)
        run.train()
