"""A Trainer whose upper variable, a weight for each class, is no parameter of the model."""

import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Problem


class Scaled(torch.nn.Module):
    """A classifier of ten numbers."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Weighted(Problem):
    """Cross-entropy with a weight for each class, which is the upper level's."""

    def __init__(self, model, weight, **level):
        self.model, self.weight = model, weight
        super().__init__(model.named_parameters(), **level)

    def loss(self, batch):
        logits, labels = self.model(**batch)["logits"], batch["labels"]
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        pull = sum(p.square().sum() for p in self.model.parameters())
        return (3 * self.weight.softmax(0)[labels] * each).mean() + 0.1 * pull


class Plain(Problem):
    """The model's own loss, over the class weights."""

    def __init__(self, model, weight, **level):
        self.model = model
        super().__init__([("weight", weight)], **level)

    def loss(self, batch):
        return self.model(**batch)["loss"]


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return [{"x": x[i], "labels": int(x[i, :3].argmax())} for i in range(count)]


def pair(folder, data=None, callbacks=(), *, lower=Weighted, upper=Plain, **settings):
    """A program whose upper variable is no parameter of the model, over plain lists or ``data``."""
    torch.manual_seed(0)
    model, weight = Scaled(), torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    given = {
        "learning_rate": 0.1,
        "upper_learning_rate": 0.1,
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "hypergradient": "cg:steps=5",
        **settings,
    }
    return BilevelTrainer(
        model,
        lower=lower(model, weight),
        upper=upper(model, weight),
        args=BilevelTrainingArguments(output_dir=str(folder), **given),
        train_dataset=rows(64, 0) if data is None else data,
        upper_dataset=rows(64, 1),
        callbacks=list(callbacks),
    ), weight


class Stream(IterableDataset):
    """``count`` rows that are read in order."""

    def __init__(self, count):
        self.rows = rows(count, 0)

    def __iter__(self):
        return iter(self.rows)


def streamed(folder, callbacks=(), *, count=20, **settings):
    """A trainer over a stream of ``count`` rows, four to a micro-batch."""
    given = {
        "per_device_train_batch_size": 4,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "hypergradient": "darts",
        **settings,
    }
    made, _ = pair(folder, Stream(count), callbacks, **given)
    made.remove_callback(PrinterCallback)
    return made
