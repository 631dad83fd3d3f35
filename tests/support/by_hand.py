"""A small bilevel program, and steps of torch's optimizers on it written out by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Optimizer, RAdam, RMSprop

from hyperopt_peft import Engine
from tests.support.quadratic import FunctionLevel, flat

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
    "amsgrad": (Adam, {"lr": 0.05, "amsgrad": True, "betas": (0.8, 0.6), "weight_decay": 0.1}),
    "amsgrad-w": (AdamW, {"lr": 0.05, "amsgrad": True, "maximize": True, "weight_decay": 0.3}),
    "rmsprop": (RMSprop, {"lr": 0.02}),
    "rmsprop-momentum": (RMSprop, {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1, "alpha": 0.8}),
    "rmsprop-centered": (RMSprop, {"lr": 0.02, "centered": True, "eps": 1e-4, "alpha": 0.7}),
    "adagrad": (Adagrad, {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2}),
    "adadelta": (Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    "adamax": (Adamax, {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "radam": (RAdam, {"lr": 0.05, "betas": (0.8, 0.6)}),  # rectified from the third step on
    "radam-w": (RAdam, {"lr": 0.05, "weight_decay": 0.3, "decoupled_weight_decay": True}),
}


def normal(*size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator)


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
    """An upper level whose step is minus the hypergradient, and a lower one."""
    p = options.pop("dropout", 0.0)
    upper = FunctionLevel(lambda _: upper_f(w, u), u, optimizer=SGD(u, lr=1.0))
    lower = FunctionLevel(lambda b: f(w, u, b, p), w, data=BATCHES, optimizer=optimizer, **options)
    return upper, lower


# A rule gives the update lr·Δ of w, where g holds any L2 decay, in its t-th step.


def sgd(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    if o.get("momentum"):
        state[:] = [o["momentum"] * state[0] + (1 - o.get("dampening", 0)) * g if state else g]
        g = g + o["momentum"] * state[0] if o.get("nesterov") else state[0]
    return o["lr"] * g


def moments(g: Tensor, state: list[Tensor], o: Options) -> tuple[Tensor, Tensor]:
    (beta1, beta2), zero = o.get("betas", (0.9, 0.999)), torch.zeros_like(g)
    m, v, *rest = state or (zero, zero)
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    state[:] = [m, v, *rest]
    return m, v


def adam(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    (beta1, beta2), eps = o.get("betas", (0.9, 0.999)), o.get("eps", 1e-8)
    m, v = moments(g, state, o)
    if o.get("amsgrad"):
        v = torch.maximum(state[2], v) if len(state) == 3 else v
        state[2:] = [v]
    return o["lr"] * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def radam(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    (beta1, beta2), eps = o.get("betas", (0.9, 0.999)), o.get("eps", 1e-8)
    m, v = moments(g, state, o)
    bound = 2 / (1 - beta2) - 1
    rho = bound - 2 * t * beta2**t / (1 - beta2**t)
    m = m / (1 - beta1**t)
    if rho <= 5:
        return o["lr"] * m
    root = (rho - 4) * (rho - 2) * bound / ((bound - 4) * (bound - 2) * rho)
    return o["lr"] * m * root**0.5 * (1 - beta2**t) ** 0.5 / (v.sqrt() + eps)


def adamax(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    (beta1, beta2), eps = o.get("betas", (0.9, 0.999)), o.get("eps", 1e-8)
    m, largest = state or (torch.zeros_like(g), torch.zeros_like(g))
    m, largest = beta1 * m + (1 - beta1) * g, torch.maximum(beta2 * largest, g.abs() + eps)
    state[:] = [m, largest]
    return o["lr"] * m / (1 - beta1**t) / largest


def adagrad(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    (total,) = state or [torch.full_like(g, o.get("initial_accumulator_value", 0.0))]
    state[:] = [total + g * g]
    rate = o["lr"] / (1 + (t - 1) * o.get("lr_decay", 0.0))
    return rate * g / (state[0].sqrt() + o.get("eps", 1e-10))


def adadelta(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    rho, eps = o.get("rho", 0.9), o.get("eps", 1e-6)
    square, moved = state or (torch.zeros_like(g), torch.zeros_like(g))
    square = rho * square + (1 - rho) * g * g
    step = ((moved + eps) / (square + eps)).sqrt() * g
    state[:] = [square, rho * moved + (1 - rho) * step * step]
    return o["lr"] * step


def rmsprop(g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    alpha = o.get("alpha", 0.99)
    v, a, buffer = state or [torch.zeros_like(g)] * 3
    v, a = alpha * v + (1 - alpha) * g * g, alpha * a + (1 - alpha) * g
    root = (v - a * a if o.get("centered") else v).sqrt()
    buffer = o.get("momentum", 0.0) * buffer + g / (root + o.get("eps", 1e-8))
    state[:] = [v, a, buffer]
    return o["lr"] * buffer


RULES = {SGD: sgd, Adam: adam, AdamW: adam, RMSprop: rmsprop, Adagrad: adagrad}
RULES |= {Adadelta: adadelta, Adamax: adamax, RAdam: radam}


class ByHand:
    """Lower steps as a differentiable function of u; ``options`` has one entry a leaf."""

    def __init__(self, kind: type[Optimizer], options: Sequence[Options]) -> None:
        self.kind, self.options = kind, [{"weight_decay": 0.0, **o} for o in options]
        self.state: list[list[Tensor]] = [[] for _ in options]
        self.t = 0
        self.max_norm: float | None = None
        self.gamma = 1.0  # of an exponential schedule
        self.dropout = 0.0

    def step(self, w: Leaves, u: Leaves, batch: Any) -> list[Tensor]:
        loss = f(w, u, batch, self.dropout)
        gradient = list(torch.autograd.grad(loss, w, create_graph=True))
        if self.max_norm is not None:
            norm = flat(gradient).norm()
            gradient = [g * torch.clamp(self.max_norm / (norm + 1e-6), max=1) for g in gradient]
        self.t += 1
        after = []
        for x, g, state, o in zip(w, gradient, self.state, self.options, strict=True):
            o = o | {"lr": o["lr"] * self.gamma ** (self.t - 1)}
            g = -g if o.get("maximize") else g
            if self.kind is AdamW or o.get("decoupled_weight_decay"):
                x = x - o["lr"] * o["weight_decay"] * x
            else:
                g = g + o["weight_decay"] * x
            after.append(x - RULES[self.kind](g, state, self.t, o))
        return after

    def run(self, steps: int, w: Leaves, u: Leaves, batches: Sequence[Any]) -> list[Tensor]:
        w = list(w)
        for k in range(steps):
            w = self.step(w, u, batches[k % len(batches)])
        return w

    def forget_the_graph(self) -> None:
        self.state = [[s.detach() for s in state] for state in self.state]


def trained_by_hand(hand: ByHand, warmup: int, steps: int, options: Leaves = ()) -> Tensor:
    """The hypergradient through the last ``steps`` steps, that of ``options`` at its end."""
    w, u = start()
    w = [x.detach().requires_grad_() for x in hand.run(warmup, w, u, BATCHES)]
    hand.forget_the_graph()
    shift = warmup % len(BATCHES)
    after = hand.run(steps, w, u, BATCHES[shift:] + BATCHES[:shift])
    return flat(torch.autograd.grad(upper_f(after, u), [*u, *options]))


def trained(levels: Any, warmup: int, lower_steps: int, method: str) -> Tensor:
    """The hypergradient that the Engine's first upper step takes."""
    upper, lower = levels
    before = flat(upper.variables).detach()
    engine = Engine(
        upper, lower, method, lower_steps=lower_steps, warmup_steps=warmup, progress=False
    )
    engine.run(1)
    return before - flat(upper.variables).detach()
