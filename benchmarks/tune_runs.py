"""The training of `tune.py`: its hyper-parameters, and their gradient through all of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from attribution_runs import LENGTH, TASKS
from last_layers import LastLayers, States, encode
from peft import LoraConfig, PeftModel, get_peft_model
from text_data import load_model
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from hyperopt_peft import Problem
from hyperopt_peft.adapters.layers import lora_layers
from hyperopt_peft.core.problem import StepRecord
from hyperopt_peft.hypergradients.estimate import open_oracle
from hyperopt_peft.hypergradients.unrolled.optimizer_step import DifferentiableStep
from hyperopt_peft.utils.random_state import RandomState
from hyperopt_peft.utils.restore import assign_

TRAIN, HELD, TEST, BATCH, EPOCHS, WARM_UP = 200, 100, 400, 10, 2, 0.1
STEPS = EPOCHS * TRAIN // BATCH
#: Settings are chosen on these seeds, which draw from rows that no other seed draws.
DEVELOPMENT_SEEDS = (100, 101)
DEVELOPMENT_ROWS, ROWS = 700, 2100

#: The least and the largest value of each kind of hyper-parameter in a search, as in `Space`.
RANGES = {
    "rate": (math.log(1e-4), math.log(3e-2)),
    "decay": (math.log(1e-3), math.log(1e1)),
    "scale": (math.log(0.25), math.log(4.0)),
    "smoothing": (-5.0, -0.5),
    "weights": (-1.0, 1.0),
}
#: Where all but the rates start: decay .01, scale α/r, smoothing .02, equal weights.
START = {"decay": math.log(0.01), "scale": 0.0, "smoothing": -3.9, "weights": 0.0}


@dataclass(frozen=True)
class Space:
    """The hyper-parameters as one vector u, ``(n,)``, without constraints.

    Attributes:
        groups: the names of the groups of parameters. Each has ``rate``, the logarithm of its
            learning rate, and ``decay``, that of AdamW's weight decay.
        layers: the number of adapted layers. Each has ``scale``, the logarithm of the factor by
            which its update is larger than α/r·BA.
        classes: K. ``smoothing`` is the logit of the label smoothing, and ``weights`` has K logits
            w of the class weights K·softmax(w), which sum to K.
    """

    groups: tuple[str, ...]
    layers: int
    classes: int

    @property
    def sizes(self) -> dict[str, int]:
        """How many hyper-parameters there are of each kind."""
        sizes = (len(self.groups), len(self.groups), self.layers, 1, self.classes)
        return dict(zip(RANGES, sizes, strict=True))

    def parts(self, u: Tensor) -> dict[str, Tensor]:
        """The hyper-parameters of each kind, views of u."""
        return dict(zip(self.sizes, u.split(list(self.sizes.values())), strict=True))

    def plain(self, rate: float, ratio: float = 1.0) -> Tensor:
        """One learning rate for all groups, times ``ratio`` for those of B."""
        rates = [math.log(rate * (ratio if "lora_B" in name else 1.0)) for name in self.groups]
        rest = [START[k] for k, size in self.sizes.items() if k != "rate" for _ in range(size)]
        return torch.tensor(rates + rest)

    def limits(self) -> list[tuple[float, float]]:
        """The least and the largest value of each hyper-parameter in a search."""
        return [RANGES[kind] for kind, size in self.sizes.items() for _ in range(size)]


@dataclass(frozen=True)
class Rows:
    """The numbers of the rows of a task that are trained on, selected by, and reported."""

    states: States
    train: Tensor
    held: Tensor
    test: Tensor


@cache
def encoded(task: str) -> States:
    """The development half of 4,200 rows of a task."""
    table = TASKS[task]().sample(2 * ROWS, random_state=0)[:ROWS]
    return encode(list(table.text), torch.tensor(table.label.to_numpy()), LENGTH)


def draw(task: str, seed: int) -> Rows:
    """The rows of ``seed``."""
    begin, end = (0, DEVELOPMENT_ROWS) if seed in DEVELOPMENT_SEEDS else (DEVELOPMENT_ROWS, ROWS)
    order = begin + torch.randperm(end - begin, generator=torch.Generator().manual_seed(seed))
    return Rows(encoded(task), *order[: TRAIN + HELD + TEST].split([TRAIN, HELD, TEST]))


def factor(step: int) -> float:
    """The share of the rates that ``step`` has, counted from 0: it rises, then falls to 0."""
    rising = round(WARM_UP * STEPS)
    return min((step + 1) / rising, (STEPS - step) / (STEPS - rising))


class Tuned(Problem):
    """min over A, B, head of the weighted cross entropy with smoothed labels, by AdamW.

    Its learning rates, decays, update scales, smoothing and class weights are functions of u.
    """

    def __init__(self, model: PeftModel, rows: Rows, seed: int) -> None:
        self.model, self.rows, self.seed, self.number = model, rows, seed, 0
        self.layers = [layer for _, layer in lora_layers(model)]
        self.units = [layer.scaling["default"] for layer in self.layers]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.groups: dict[str, list[Tensor]] = {}
        for name, parameter in named:
            group = name if "lora_" in name else "head"
            self.groups.setdefault(group, []).append(parameter)
        classes = int(rows.states.labels.max()) + 1
        self.space = Space(tuple(self.groups), len(self.layers), classes)
        self.start = [p.detach().clone() for _, p in named]
        super().__init__(named)

    def restart(self, u: Tensor, optimizer: Any = None) -> None:
        """To the start of a training at u, or with an optimizer whose rates are its own."""
        assign_(self.variables, self.start)
        self.u = u.clone().requires_grad_()
        groups = [{"params": group} for group in self.groups.values()]
        self.optimizer = AdamW(groups) if optimizer is None else optimizer(self.variables)
        self.scheduler = None if optimizer is None else LambdaLR(self.optimizer, factor)

    def visits(self, order: int) -> list[Tensor]:
        """The rows of each step; ``order`` numbers the orders of the data."""
        source = torch.Generator().manual_seed(1000 * self.seed + order)
        epochs = [torch.randperm(TRAIN, generator=source).split(BATCH) for _ in range(EPOCHS)]
        return [self.rows.train[batch] for epoch in epochs for batch in epoch]

    def optimizer_options(self) -> list[dict[str, Tensor]]:
        """The rates at the step ``number``, and the decays."""
        if self.scheduler is not None:
            return []
        parts = self.space.parts(self.u)
        rates, decays = parts["rate"].exp() * factor(self.number), parts["decay"].exp()
        return [{"lr": r, "weight_decay": d} for r, d in zip(rates, decays)]

    def logits(self, index: Tensor) -> Tensor:
        """The logits of rows of the task, with the update scales of u."""
        scales = self.space.parts(self.u)["scale"].exp()
        for layer, unit, scale in zip(self.layers, self.units, scales, strict=True):
            layer.scaling["default"] = unit * scale
        inputs = self.rows.states.inputs(index)
        length = int(inputs["mask"].sum(1).max())
        logits: Tensor = self.model(inputs["states"][:, :length], inputs["mask"][:, :length]).logits
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        """1/B Σ_i w_{y_i} Σ_k q_ik (−log p_ik), with q the smoothed labels of the batch."""
        parts, classes = self.space.parts(self.u), self.space.classes
        labels, smoothing = self.rows.states.labels[batch], parts["smoothing"].sigmoid()
        wanted = (1 - smoothing) * one_hot(labels, classes) + smoothing / classes
        each = -(wanted * self.logits(batch).log_softmax(1)).sum(1)
        return (classes * parts["weights"].softmax(0)[labels] * each).mean()

    def train(
        self, u: Tensor, order: int = 0, optimizer: Any = None, keep: bool = False
    ) -> list[StepRecord]:
        """The training at u; returns its steps, if it shall ``keep`` them."""
        self.restart(u, optimizer)
        records = []
        for number, batch in enumerate(self.visits(order)):
            self.number, state = number, RandomState.capture(self.devices)
            gradient = self.gradient(batch, self.variables).gradient
            if keep:
                point = tuple(variable.detach().clone() for variable in self.variables)
                snapshot = self.optimizer_snapshot(with_state=True)
                records.append(StepRecord(batch, state, point, gradient, None, snapshot))
            self.step(gradient)
        return records

    @torch.no_grad()
    def measure(self, index: Tensor) -> tuple[float, float]:
        """Mean cross entropy and accuracy of rows of the task."""
        logits, labels = self.logits(index), self.rows.states.labels[index]
        accuracy = (logits.argmax(1) == labels).double().mean()
        return float(cross_entropy(logits, labels)), float(accuracy)


class HeldOut(Problem):
    """The mean cross entropy of the held-out rows, a function of u."""

    def __init__(self, lower: Tuned) -> None:
        self.lower = lower
        super().__init__([("u", lower.u)])

    def loss(self, batch: object) -> Tensor:
        """The mean."""
        rows = self.lower.rows
        return cross_entropy(self.lower.logits(rows.held), rows.states.labels[rows.held])


def hypergradient(level: Tuned, steps: Sequence[StepRecord]) -> tuple[Tensor, int]:
    """d(held-out loss)/du through all ``steps`` of the training that ended last, and its passes.

    As the estimator "unrolled", with rates that follow a schedule. A pass is a forward+backward
    pass, or a second backward pass, of a batch; the one over the held-out rows is not counted.
    """
    oracle = open_oracle(HeldOut(level), level, upper_batch=None, lower_batch=steps[-1].batch)
    with oracle.open():
        above = oracle.upper_gradient
        found, adjoint, moments = above.direct, above.b, None
        for level.number, record in reversed(list(enumerate(steps))):
            optimizer = DifferentiableStep(level, record.optimizer or {})
            w_bar, g_bar, moments, options = optimizer.vjp(record, adjoint, moments)
            with oracle.product("exact", at=record) as product:
                hessian, mixed = product.both(g_bar)
            found = found + mixed + optimizer.pulled_back(options, [level.u])
            adjoint = w_bar + hessian
    return found.parts[0].clone(), oracle.passes.gradients - 1 + oracle.passes.products


def level(task: str, seed: int, full: bool = False) -> Tuned:
    """A new adapter on MiniLM's last two layers and a head, about to be trained.

    With ``full`` the layers are trained in place of the adapter.
    """
    rows = draw(task, seed)
    classes = int(rows.states.labels.max()) + 1
    torch.manual_seed(seed)
    body = LastLayers(load_model("minilm", ["no", "yes"]), classes)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = get_peft_model(body, config)
    for name, parameter in model.named_parameters() if full else ():
        parameter.requires_grad_("lora_" not in name and "original_module" not in name)
    return Tuned(model.eval(), rows, seed)
