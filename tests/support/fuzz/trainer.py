"""Random runs of `BilevelTrainer`: the grammar, the model, the rows, collators and methods."""

from collections.abc import Sequence
from dataclasses import make_dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, TrainerCallback, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.problems import RowWeights
from hyperopt_peft.utils.models import is_uncounted
from tests.support.fuzz.grammar import Sentence
from tests.support.trainers import QUIET, sampling

WORDS, FEATURES, CLASSES, SOURCES = 8, 3, 3, 3
UPPER_ROWS, FIRST_UPPER = 7, 100  # the first number of an upper row
RATES = 0.3, 0.5
LIMITS = {"no": (0, 0), "lower": (0.2, 0), "upper": (0, 0.02), "both": (0.2, 0.02)}
PULL = 0.3  # the weight of ½‖w‖²

#: The choices of each field with their odds.
GRAMMAR: dict[str, dict[Any, int]] = {
    "method": {"decay": 3, "scale": 2, "sigmoid": 3, "softmax": 1, "column": 2, "offsets": 3},
    "estimator": {
        "direct": 1,
        "darts": 2,
        "darts:scheme=forward": 1,
        "darts:product=exact,xi=lr": 1,
        "darts:product=dots": 1,
        "sama": 1,
        "sama:product=exact": 1,
        "unrolled": 1,
        "minres:steps=40,tolerance=1e-10,damping=0.3": 2,
        "cg:steps=40,tolerance=1e-10,damping=0.3,product=difference": 1,
        "cg:steps=1,damping=0.01": 1,
        "exact:damping=0.3": 1,
        "neumann:terms=5,step_size=0.2": 1,
        "warm:step_size=0.3,damping=0.3": 2,
        "f2sa:growth=0.0,tolerance=1e-7,inner_steps=500": 2,
    },
    "table": {"mixed": 3, "sorted": 2},  # by class
    "order": {"random": 2, "sequential": 1},
    "count": {9: 1, 12: 1, 13: 1},
    "batch": {2: 1, 3: 2, 4: 1, 5: 1},
    "accumulation": {1: 3, 2: 2, 3: 1},
    "lower_steps": {1: 2, 2: 2, 3: 1},
    "upper_batch": {None: 2, 2: 1, 3: 1},
    "collator": {"stock": 4, "pads": 3, "sorts": 2, "drops": 1},
    "loss": {"mean": 4, "sum": 2, "weighted": 2},  # of the model
    "smoothing": {0.0: 6, 0.2: 1, 0.01: 1},
    "writes": {"no": 9, "batch": 1},
    "dropout": {0.0: 2, 0.3: 1},
    "optimizer": {"sgd": 1, "adamw_torch": 1},
    "decay": {0.0: 1, 0.2: 1},
    "clipping": {"no": 2, "lower": 1, "upper": 1, "both": 1},
    "schedule": {"linear": 1, "constant": 1},
    "prior": {None: 2, 2.0: 1},
}


class Run(make_dataclass("Words", ["seed", *GRAMMAR], frozen=True), Sentence):  # type: ignore[misc]
    """A sentence of `GRAMMAR`: the settings of one run."""

    grammar = GRAMMAR
    odd = ("collator", "loss", "smoothing", "writes")

    def possible(self) -> Self:
        """This run, with an estimator that its method can have, and a loss that can write."""
        if not self.weighs_rows:
            dots = self.estimator == "darts:product=dots"
            return replace(self, estimator="darts") if dots else self
        convex = self.estimator.startswith("f2sa")
        return replace(self, writes="no", estimator="darts" if convex else self.estimator)

    @property
    def weighs_rows(self) -> bool:
        """Whether the method is the library's, whose f has no term that makes it convex."""
        return self.method in ("sigmoid", "softmax")


class Numbers:
    """The numbers of a run: rows, embeddings, class weights and initial values, in float64."""

    def __init__(self, form: Run) -> None:
        self.draws = torch.Generator().manual_seed(form.seed)
        shapes = (WORDS, FEATURES), (CLASSES, FEATURES), (CLASSES,), (FEATURES,)
        self.embedding, self.weight, self.bias, self.u = (
            torch.randn(*shape, generator=self.draws, dtype=torch.float64) for shape in shapes
        )
        self.class_weights = self.weight[0].abs() + 0.2
        self.lower, self.upper = self.rows(form, form.count), self.rows(form, UPPER_ROWS)
        self.upper = [{**row, "number": FIRST_UPPER + row["number"]} for row in self.upper]

    def rows(self, form: Run, count: int) -> list[dict[str, Any]]:
        """Rows whose ``number`` the model sees; the first have a class each."""

        def below(end: int, *shape: int) -> Any:
            return torch.randint(end, shape, generator=self.draws).tolist()

        rows = []
        for k in range(count):
            length = 3 if form.collator == "stock" else 2 + below(3)
            tokens = [1 + word for word in below(WORDS - 1, length)]
            label = k if k < CLASSES else below(CLASSES)
            rows.append({"tokens": tokens, "labels": label, "source": below(SOURCES)})
        if form.table == "sorted":
            rows.sort(key=lambda row: row["labels"])
        return [{**row, "number": k} for k, row in enumerate(rows)]


class Classifier(nn.Module):
    """The mean of a row's embedded tokens, of which 0 is padding, to logits; linear in w.

    ``seen`` has the numbers of the rows of each batch in training, with its dropout mask.
    """

    def __init__(self, form: Run, numbers: Numbers) -> None:
        super().__init__()
        self.form, self.accepts_loss_kwargs = form, form.loss == "sum"
        self.config = PretrainedConfig(num_labels=CLASSES)
        self.seen: dict[tuple[int, ...], Tensor] = {}
        self.embedding = nn.Embedding.from_pretrained(numbers.embedding)
        self.class_weights = numbers.class_weights if form.loss == "weighted" else None
        self.linear = nn.Linear(FEATURES, CLASSES).double()
        self.linear.load_state_dict({"weight": numbers.weight, "bias": numbers.bias})
        self.scale = nn.Parameter(1 + numbers.u / 5, requires_grad=form.method == "scale")

    def forward(
        self, tokens: Tensor, number: Tensor, labels: Any = None, num_items_in_batch: Any = None
    ) -> SequenceClassifierOutput:
        present = (tokens > 0).double().unsqueeze(-1)
        x = (self.embedding(tokens) * present).sum(1) / present.sum(1)
        if self.training:
            mask = (torch.rand_like(x) > self.form.dropout).double()
            if not is_uncounted():
                self.seen[tuple(number.tolist())] = mask
            x = x * mask
        logits = self.linear(x * self.scale if self.form.method == "scale" else x)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        loss = cross_entropy(logits, labels, self.class_weights)
        if num_items_in_batch is not None:
            loss = loss * len(labels) / num_items_in_batch
        return SequenceClassifierOutput(loss=loss, logits=logits)


def collated(kind: str, rows: Sequence[Any]) -> dict[str, Tensor]:
    """A padded batch of ``rows``: as they are, longest first, or without the last one."""
    rows = sorted(rows, key=lambda row: -len(row["tokens"])) if kind == "sorts" else rows
    rows = rows[: max(1, len(rows) - 1)] if kind == "drops" else rows
    longest = max(len(row["tokens"]) for row in rows)
    padded = [row["tokens"] + [0] * (longest - len(row["tokens"])) for row in rows]
    return default_data_collator([{**x, "tokens": t} for x, t in zip(rows, padded, strict=True)])


class Weights(RowWeights):
    def prepare(self, model: Any) -> None:
        super().prepare(model)
        self.logits = self.logits.detach().double().requires_grad_()


class Own(Method):
    """The methods that are not the library's; f of each has a term that makes it convex."""

    def __init__(self, form: Run, numbers: Numbers) -> None:
        self.form, self.tags = form, ("source",) if form.method == "column" else ()
        self.own_loss = form.loss != "weighted" and not form.smoothing
        self.u = (numbers.u[:2] if form.method == "decay" else numbers.u).clone().requires_grad_()

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return {"u": model.scale if self.form.method == "scale" else self.u}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Tensor:
        if self.form.writes == "batch":
            batch["tokens"].copy_(written(batch["tokens"]))
        squares = torch.stack([x.square().sum() for x in model.linear.parameters()]) / 2
        if self.form.method == "decay":
            return task_loss(batch) + PULL * self.u.exp() @ squares
        if self.form.method == "offsets":
            logits = model(batch["tokens"], batch["number"]).logits
            loss = cross_entropy(logits + self.u, batch["labels"])
        elif self.form.method == "column":
            inputs = {name: x for name, x in batch.items() if name != "source"}
            sums, counts = row_losses(model, inputs)
            loss = (2 * self.u[batch["source"]].sigmoid() * sums).sum() / counts.sum()
        else:
            loss = task_loss(batch)
        return loss + PULL * squares.sum()

    def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Tensor:
        if self.form.method != "offsets":
            return task_loss(batch)
        logits = model(batch["tokens"], batch["number"]).logits
        return cross_entropy(logits, batch["labels"]) + self.u.square().sum() / 20


def written(tokens: Tensor) -> Tensor:
    """Each token but padding replaced by the next one."""
    return torch.where(tokens > 0, tokens % (WORDS - 1) + 1, 0)


class Steps(TrainerCallback):
    """What each step read, the rows and masks of both levels' batches, and its logs."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.done: list[dict[tuple[int, ...], Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.model.seen.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done.append(dict(self.model.seen))
        self.model.seen.clear()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def trained(form: Run, numbers: Numbers, steps: Steps, folder: str) -> tuple[Tensor, Tensor]:
    """w and u after a run of ``form`` in ``folder``, which ``steps`` watches."""
    model = steps.model
    weights = Weights(keep=None, form=form.method) if form.weighs_rows else None
    method: Any = weights or Own(form, numbers)
    args = BilevelTrainingArguments(
        folder,
        **QUIET,
        hypergradient=form.estimator,
        retrain="none",
        seed=form.seed % 2**32,
        max_steps=3 * form.lower_steps + 1,
        lower_steps=form.lower_steps,
        per_device_train_batch_size=form.batch,
        per_device_upper_batch_size=form.upper_batch,
        gradient_accumulation_steps=form.accumulation,
        label_smoothing_factor=form.smoothing,
        **sampling(form.order),
        optim=form.optimizer,
        adam_epsilon=1e-2,
        learning_rate=RATES[0],
        upper_learning_rate=RATES[1],
        weight_decay=form.decay,
        upper_weight_decay=form.decay / 2,
        max_grad_norm=LIMITS[form.clipping][0],
        upper_max_grad_norm=LIMITS[form.clipping][1],
        lr_scheduler_type=form.schedule,
        upper_prior=form.prior,
    )
    BilevelTrainer(
        model,
        args,
        method=method,
        train_dataset=Dataset.from_list(numbers.lower),
        upper_dataset=Dataset.from_list(numbers.upper),
        row_losses=row_losses if weights and not form.smoothing else None,
        data_collator=None if form.collator == "stock" else partial(collated, form.collator),
        callbacks=[steps],
    ).train()
    (u,) = method.upper_variables(model).values()
    return torch.cat([x.detach().flatten() for x in model.linear.parameters()]), u.detach()
