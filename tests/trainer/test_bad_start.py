"""What shows only when training begins is refused before anything has moved."""

import torch
from datasets import Value
from torch import nn

from hyperopt_peft import BilevelTrainer, NonFiniteError, Problem, ProblemError
from tests.support.refusals import APART, cases, refuses, relabelled
from tests.support.trainers import arguments, data, peft_model, trainer, values


class Fading(nn.Module):
    """A model whose loss is ``form`` of its outputs."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.ones(6))
        self.scale = nn.Parameter(torch.ones(6))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, input_ids=None, labels=None):
        return {"loss": self.form(input_ids * self.weight, self.scale)}


class Own(Problem):
    """The model's own loss."""

    def __init__(self, model, *variables, name=None):
        self.model = model
        named = dict(model.named_parameters())
        super().__init__([(key, named[key]) for key in variables], name=name)

    def loss(self, batch):
        return self.model(**batch)


def product(y, scale):
    return (y * scale).square().mean()


LEVELS = {
    "a lower variable that no loss reads": (
        product,
        {"lower": ("weight", "idle"), "upper": ("scale",)},
        ProblemError,
        "lower: no gradient reaches the variable 'idle' at the first step; use it in the loss",
    ),
    "an upper variable that no loss reads": (
        product,
        {"lower": ("weight",), "upper": ("scale", "idle")},
        ProblemError,
        "upper: no gradient reaches the variable 'idle' at the first step; use it in the loss",
    ),
    "a loss for every example": (
        lambda y, scale: (y * scale).mean(1),
        {},
        ProblemError,
        r"lower: loss must be a real scalar tensor, got \(4,\)",
    ),
    "a loss that is a number": (
        lambda y, scale: product(y, scale).item(),
        {},
        ProblemError,
        "lower: loss must be a real scalar tensor, got float",
    ),
    "a loss that is cut off": (
        lambda y, scale: product(y, scale).detach(),
        {},
        ProblemError,
        r"lower: the loss does not depend on any tensor .* look for detach\(\)",
    ),
    "a loss that is NaN": (
        lambda y, scale: product(y, scale) * float("nan"),
        {},
        NonFiniteError,
        r"step 1 .*: the loss is nan; lower the .*; the state before it is in .*checkpoint-0",
    ),
    "a gradient that is infinite": (
        lambda y, scale: product(y, scale) + (y[0, 0] * 0).sqrt() * 0,
        {},
        NonFiniteError,
        r"step 1 \(epoch .*lower: the gradient is not finite at loss",
    ),
}


@cases(LEVELS)
def test_losses(case, tmp_path):
    form, owned, error, message = case
    owned = {"lower": ("weight",), "upper": ("scale",), **owned}
    model = Fading(form)
    parts = {name: Own(model, *variables, name=name) for name, variables in owned.items()}
    args = arguments(tmp_path, lower_steps=1)
    run = BilevelTrainer(model, **parts, args=args, **APART)
    refuses(error, message, model, run.train)


def step(*, options=None, **settings):
    """A `BiDoRATrainer` that is built without an error."""
    return lambda model, folder: trainer(folder, model=model, options=options, **settings)


def layer_wise(model):
    """A function that makes an optimizer of a whole model."""


def as_tensors(examples):
    return {key: torch.tensor([row[key] for row in examples]) for key in examples[0]}


def ragged():
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
        r"no loss for a batch of \['attention_mask', 'input_ids'\]: .* must have .*labels",
    ),
    "labels without an output": (
        step(options=UNKNOWN),
        {},
        "the model has no loss for a batch of .*: Target 3 is out of bounds.*labels that it knows",
    ),
    "labels that are no classes": (
        step(options={"train_dataset": data().cast_column("labels", Value("float32"))}),
        {},
        r"the model has no loss for a batch of .*: Target size \(torch.Size\(\[4\]\)\)",
    ),
    "tokens outside the vocabulary": (
        step(options={"train_dataset": data().map(lambda row: {"input_ids": [50] * 6})}),
        {},
        "the model has no loss for a batch of .*: index out of range",
    ),
    "examples of different length": (
        step(options={"train_dataset": ragged()}),
        {},
        "makes no batch of examples of train_dataset .* DataCollatorWithPadding",
    ),
    "text beside tokens": (
        step(
            options={"train_dataset": TEXT, "data_collator": as_tensors},
            remove_unused_columns=False,
        ),
        {},
        "makes no batch of examples of train_dataset .* columns of text must be removed",
    ),
    "an upper set of different length": (
        step(options={**APART, "upper_dataset": ragged()}, lower_steps=1),
        {},
        "makes no batch of examples of upper_dataset .* DataCollatorWithPadding",
    ),
    "options of another optimizer": (
        step(options={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"beta": 0.9})}),
        {},
        r"SGD does not take \{'beta': 0.9\}",
    ),
    "options out of the optimizer's range": (
        step(adam_beta1=1.5),
        {},
        "AdamW does not take .*: Invalid beta parameter at index 0: 1.5",
    ),
    "more lower steps than steps": (
        step(max_steps=3, lower_steps=4),
        {},
        "lower_steps=4 leaves no upper step in a run of 3 steps; .* lower lower_steps",
    ),
    "more lower steps than the epochs have": (
        step(max_steps=-1, num_train_epochs=2, lower_steps=11),
        {},
        "lower_steps=11 leaves no upper step in a run of 10 steps",
    ),
    "checkpointing that hides variables": (
        step(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        {},
        "reentrant gradient checkpointing hides variables .*use_reentrant",
    ),
    "an optimizer whose step sama does not know": (
        step(hypergradient="sama", optim="adafactor"),
        {},
        "Direction: the form of Adafactor's step is not known; use one of SGD",
    ),
    "an optimizer that cannot be unrolled": (
        step(hypergradient="unrolled:steps=1", optim="adafactor"),
        {},
        "Direction: the form of Adafactor's step is not known; use one of SGD",
    ),
    "an optimizer that chooses its parameters": (
        step(options={"optimizer_cls_and_kwargs": (layer_wise, {})}),
        {},
        "the optimizer layer_wise chooses its own parameters; .* such as adamw_torch",
    ),
    "nothing to resume from": (
        step(),
        {"resume_from_checkpoint": True},
        "there is no whole checkpoint in",
    ),
    "no such checkpoint": (
        step(),
        {"resume_from_checkpoint": "nowhere"},
        "there is no checkpoint nowhere",
    ),
}


@cases(TRAINING)
def test_the_beginning_of_training(case, tmp_path):
    make, options, message = case
    model = peft_model()
    run = make(model, tmp_path)
    refuses(ProblemError, message, model, lambda: run.train(**options))
    assert run.state.global_step == 0


def test_as_many_lower_steps_as_steps_make_one_upper_step(tmp_path):
    run = trainer(tmp_path, max_steps=4, lower_steps=4)
    before = {m: v for m, v in values(run.model).items() if "magnitude" in m}
    run.train()
    after = values(run.model)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_control_has_no_upper_steps_to_miss(tmp_path):
    run = trainer(tmp_path, method="dora", max_steps=1, lower_steps=4)
    run.train()
    assert run.state.global_step == 1


def test_label_smoothing_is_the_levels_own_where_the_losses_are_the_trainers(tmp_path):
    run = trainer(tmp_path, label_smoothing_factor=0.1, retrain="warm", retrain_steps=1)
    run.train()
    assert run.retrainer.state.global_step == 1
