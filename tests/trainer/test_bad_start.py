"""What shows only when training begins is refused before anything has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyperopt_peft import NonFiniteError, Problem, ProblemError
from tests.support.class_weights import Plain, Weighted, pair
from tests.support.refusals import APART, cases, refuses, relabelled
from tests.support.trainers import data, peft_model, trainer


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


def step(*, options: Any = None, **settings: Any) -> Any:
    """A trainer that is built without an error."""
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


@pytest.mark.parametrize("below", [False, True])
def test_checkpoints_that_nothing_can_be_written_to_are_refused(
    tmp_path: Path, below: bool
) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = file / "below" if below else file
    with pytest.raises(ProblemError, match=f"output_dir: {file} is no folder to write to"):
        trainer(folder, save_strategy="steps")


def test_a_step_outside_of_training_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    batch = next(iter(run.get_train_dataloader()))
    for _ in range(2):
        with pytest.raises(ProblemError, match=r"training_step: .*call train\(\)"):
            run.training_step(run.model, batch)
        run.train()
