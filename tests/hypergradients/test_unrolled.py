"""Unrolling, backwards and forwards, against autograd through the same optimizer steps by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from benchmarks.memory import peak_memory
from hyperopt_peft import Engine, hypergradient
from tests.support.by_hand import (
    BATCHES,
    OPTIMIZERS,
    ByHand,
    make_levels,
    start,
    trained,
    trained_by_hand,
    upper_f,
)
from tests.support.quadratic import FunctionLevel, flat

SOME = ("nesterov", "adamw", "rmsprop-centered")
each_optimizer = pytest.mark.parametrize(
    ("optimizer", "method"),
    [*((name, "unrolled") for name in OPTIMIZERS), *((name, "forward") for name in SOME)],
)
both_modes = pytest.mark.parametrize("method", ["unrolled", "forward"])


@each_optimizer
def test_training_is_differentiated_like_the_steps_by_hand(optimizer: str, method: str) -> None:
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    expected = trained_by_hand(ByHand(kind, [options] * 2), 2, 3)
    actual = trained(make_levels(kind(w, **options), w, u), 2, 3, f"{method}:steps=3")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@both_modes
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("setting", ["clipping", "groups", "schedule", "dropout", "truncated"])
def test_each_step_is_differentiated_as_it_was_done(
    optimizer: str, setting: str, method: str
) -> None:
    """The groups are in the reverse order of the variables; each step has its own dropout mask."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    groups, more, steps = [{"params": w}], {}, 3
    hand = ByHand(kind, [options] * 2)
    if setting == "clipping":
        hand.max_norm = more["max_grad_norm"] = 0.05
    elif setting == "groups":
        faster = options | {"lr": 3 * options["lr"], "weight_decay": 0.2}
        groups = [{"params": [w[1]], **faster}, {"params": [w[0]]}]
        hand = ByHand(kind, [options, faster])
    elif setting == "dropout":
        hand.dropout = more["dropout"] = 0.5
    optimizer_of_w = kind(groups, **options)
    if setting == "schedule":
        hand.gamma = 0.7
        more["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer_of_w, 0.7)
    torch.manual_seed(3)
    done = 5 if setting == "truncated" else steps
    expected = trained_by_hand(hand, 2 + done - steps, steps)
    torch.manual_seed(3)
    levels: Any = make_levels(optimizer_of_w, w, u, **more)
    actual = trained(levels, 2, done, f"{method}:steps={steps}")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@each_optimizer
def test_outside_training_steps_are_simulated_from_the_current_point(
    optimizer: str, method: str
) -> None:
    """F is differentiated at the current point, on which the optimizer's state depends."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    hand, made = ByHand(kind, [options] * 2), kind(w, **options)
    upper, lower = make_levels(made, w, u)
    hand.run(2, w, u, BATCHES)
    for _ in range(2):
        lower.step(lower.gradient(lower.next_batch(), w).gradient)
    hand.forget_the_graph()
    direct = flat(torch.autograd.grad(upper_f(w, u), u, materialize_grads=True))
    adjoint = torch.autograd.grad(upper_f(w, u), w)
    after = hand.run(3, w, u, [BATCHES[2]])
    implicit = flat(torch.autograd.grad(after, u, adjoint))
    actual = flat(hypergradient(upper, lower, f"{method}:steps=3"))
    torch.testing.assert_close(actual, direct + implicit, rtol=1e-12, atol=1e-12)
    assert implicit.norm() > 0.01 * direct.norm()


@both_modes
def test_graphs_of_two_steps_are_never_held_at_once(method: str) -> None:
    """Another step adds what is recorded of it, here 3 vectors of 4 numbers, and no graph."""

    def held(steps: int) -> int:
        x = torch.linspace(-1, 1, 40_000, dtype=torch.float64).reshape(-1, 4)
        w = torch.ones(4, dtype=torch.float64, requires_grad=True)
        u = torch.ones((), dtype=torch.float64, requires_grad=True)

        def f(_: Any) -> Tensor:
            return (torch.tanh(x @ w) * u).exp().square().mean()

        upper = FunctionLevel(lambda _: w.square().sum(), [u], optimizer=SGD([u], lr=0.1))
        lower = FunctionLevel(f, [w], optimizer=SGD([w], lr=0.1, momentum=0.9))
        engine = Engine(upper, lower, f"{method}:steps={steps}", lower_steps=steps, progress=False)
        engine.run(1)
        return peak_memory(lambda: engine.run(1), torch.device("cpu"))

    few, many = held(2), held(12)
    assert few > 5 * 8 * 10_000  # the graph of one step
    assert many - few < 10 * 3 * 4 * 8 + 1000
