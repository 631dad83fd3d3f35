"""A small bilevel program, and steps of torch's optimizers on it written out by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

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


def sgd_step(w: Tensor, g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    g = g + o.get("weight_decay", 0.0) * w
    if o.get("momentum"):
        state[:] = [o["momentum"] * state[0] + (1 - o.get("dampening", 0)) * g if state else g]
        g = g + o["momentum"] * state[0] if o.get("nesterov") else state[0]
    return w - o["lr"] * g


def adam_step(
    w: Tensor, g: Tensor, state: list[Tensor], t: int, o: Options, decoupled: bool = False
) -> Tensor:
    (beta1, beta2), eps, decay = o.get("betas", (0.9, 0.999)), o.get("eps", 1e-8), o["weight_decay"]
    if decoupled:
        w = w - o["lr"] * decay * w
    else:
        g = g + decay * w
    m, v = state or (torch.zeros_like(g), torch.zeros_like(g))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    state[:] = [m, v]
    return w - o["lr"] * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def rmsprop_step(w: Tensor, g: Tensor, state: list[Tensor], t: int, o: Options) -> Tensor:
    alpha, g = o.get("alpha", 0.99), g + o["weight_decay"] * w
    v, a, buffer = state or [torch.zeros_like(g)] * 3
    v, a = alpha * v + (1 - alpha) * g * g, alpha * a + (1 - alpha) * g
    root = (v - a * a if o.get("centered") else v).sqrt()
    buffer = o.get("momentum", 0.0) * buffer + g / (root + o.get("eps", 1e-8))
    state[:] = [v, a, buffer]
    return w - o["lr"] * buffer


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
            if self.kind is SGD:
                after.append(sgd_step(x, g, state, self.t, o))
            elif self.kind is RMSprop:
                after.append(rmsprop_step(x, g, state, self.t, o))
            else:
                after.append(adam_step(x, g, state, self.t, o, decoupled=self.kind is AdamW))
        return after

    def run(self, steps: int, w: Leaves, u: Leaves, batches: Sequence[Any]) -> list[Tensor]:
        w = list(w)
        for k in range(steps):
            w = self.step(w, u, batches[k % len(batches)])
        return w

    def forget_the_graph(self) -> None:
        self.state = [[s.detach() for s in state] for state in self.state]


def trained_by_hand(hand: ByHand, warmup: int, steps: int) -> Tensor:
    """The hypergradient through the last ``steps`` steps."""
    w, u = start()
    w = [x.detach().requires_grad_() for x in hand.run(warmup, w, u, BATCHES)]
    hand.forget_the_graph()
    shift = warmup % len(BATCHES)
    after = hand.run(steps, w, u, BATCHES[shift:] + BATCHES[:shift])
    return flat(torch.autograd.grad(upper_f(after, u), u))


def trained(levels: Any, warmup: int, lower_steps: int, method: str) -> Tensor:
    """The hypergradient that the Engine's first upper step takes."""
    upper, lower = levels
    before = flat(upper.variables).detach()
    engine = Engine(
        upper, lower, method, lower_steps=lower_steps, warmup_steps=warmup, progress=False
    )
    engine.run(1)
    return before - flat(upper.variables).detach()
