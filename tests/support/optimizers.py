"""A small bilevel program, and slopes through steps of torch's optimizers on it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Optimizer, RAdam, RMSprop

from hyperopt_peft import Engine
from tests.support.differences import displace, gradient
from tests.support.quadratic import FunctionLevel, flat, normal, taken

Leaves = Sequence[Tensor]
Options = dict[str, Any]
OPTIMIZERS: dict[str, tuple[type[Optimizer], Options]] = {
    "sgd": (SGD, {"lr": 0.3}),
    "decay": (SGD, {"lr": 0.3, "weight_decay": 0.1}),
    "momentum": (SGD, {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1}),
    "dampening": (SGD, {"lr": 0.2, "momentum": 0.8, "dampening": 0.4}),
    "nesterov": (SGD, {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "adam": (Adam, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam-decay": (Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.05, "weight_decay": 0.3}),
    "maximize": (SGD, {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1, "maximize": True}),
    "adamw-maximize": (AdamW, {"lr": 0.05, "maximize": True, "weight_decay": 0.3}),
    "rmsprop": (RMSprop, {"lr": 0.02}),
    "rmsprop-momentum": (RMSprop, {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1, "alpha": 0.8}),
    "rmsprop-centered": (RMSprop, {"lr": 0.02, "centered": True, "eps": 1e-4, "alpha": 0.7}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2}),
    "adadelta": (Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    "adamax": (Adamax, {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "radam": (RAdam, {"lr": 0.05, "betas": (0.8, 0.6)}),  # rectified from the third step on
    "radam-w": (RAdam, {"lr": 0.05, "weight_decay": 0.3, "decoupled_weight_decay": True}),
}


BATCHES = [(normal(5, 3, seed=k), normal(5, 2, seed=10 + k)) for k in range(3)]


def f(w: Leaves, u: Leaves, batch: Any, p: float = 0.0) -> Tensor:
    """A network of one layer; u gates its inputs and sets its decay. ``p``: dropout."""
    (x, y), (a, s), (gate, decay) = batch, w, u
    hidden = dropout(torch.tanh((x * gate) @ a), p)
    return (hidden * s - y).square().mean() + decay.exp() * flat(w).square().sum() / 10


def upper_f(w: Leaves, u: Leaves) -> Tensor:
    x, y = normal(6, 3, seed=20), normal(6, 2, seed=21)
    return (torch.tanh(x @ w[0]) * w[1] - y).square().mean() + u[0].square().sum() / 50


def start() -> tuple[list[Tensor], list[Tensor]]:
    w = [normal(3, 2, seed=1), torch.tensor(0.7, dtype=torch.float64)]
    u = [1 + 0.3 * normal(3, seed=2), torch.tensor(-1.0, dtype=torch.float64)]
    return [x.requires_grad_() for x in w], [x.requires_grad_() for x in u]


def make_levels(optimizer: Optimizer | None, w: Leaves, u: Leaves, **options: Any) -> Any:
    p = options.pop("dropout", 0.0)
    upper = FunctionLevel(lambda _: upper_f(w, u), u, lr=1.0)
    lower = FunctionLevel(lambda b: f(w, u, b, p), w, data=BATCHES, optimizer=optimizer, **options)
    return upper, lower


def new_levels(kind: type[Optimizer], options: Options, **level: Any) -> Any:
    """Levels at their start, with an optimizer of the lower one."""
    w, u = start()
    return make_levels(kind(w, **options), w, u, **level)


def slopes(
    make: Callable[[], Any], steps: int, before: int = 0, value: Callable[..., Any] | None = None
) -> Tensor:
    """d value/du over ``steps`` lower steps that follow ``before`` ones, by central differences.

    ``make`` returns both levels anew, and their own optimizers take the steps. ``value`` is a
    function of the levels; by default F.
    """

    def at(shift: Tensor) -> float:
        torch.manual_seed(3)
        upper, lower = make()
        for k in range(before + steps):
            if k == before:
                displace(upper.variables, shift)
            lower.step(lower.gradient(lower.next_batch(), lower.variables).gradient)
        return float(value(upper, lower) if value else upper.evaluate(None)[0])

    return gradient(at, len(flat(make()[0].variables)))


def trained(levels: Any, warmup: int, lower_steps: int, method: str) -> Tensor:
    """The hypergradient that the Engine's first upper step takes."""
    steps = {"lower_steps": lower_steps, "warmup_steps": warmup}
    torch.manual_seed(3)
    return taken(Engine(*levels, method, progress=False, **steps))[0]
