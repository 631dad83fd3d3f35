"""Unrolling, and one step of it, against differences and by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from benchmarks.memory import peak_memory
from hyperopt_peft import Engine, ProblemError, hypergradient
from tests.support.optimizers import OPTIMIZERS, f, make_levels, slopes, start, trained, upper_f
from tests.support.quadratic import FunctionLevel, flat, program


def made(optimizer: str, setting: str = "") -> Any:
    """Levels; "groups" are in the reverse order of the variables."""
    kind, options = OPTIMIZERS[optimizer]
    w, u = start()
    groups, more = [{"params": w}], {}
    if setting == "groups":
        faster = options | {"lr": 3 * options["lr"], "weight_decay": 0.2}
        groups = [{"params": [w[1]], **faster}, {"params": [w[0]]}]
    elif setting == "clipping":
        more["max_grad_norm"] = 0.05
    elif setting == "dropout":
        more["dropout"] = 0.5
    optimizer_of_w = kind(groups, **options)
    if setting == "schedule":
        more["scheduler"] = ExponentialLR(optimizer_of_w, 0.7)
    return make_levels(optimizer_of_w, w, u, **more)


def assert_slope(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("setting", ["clipping", "groups", "schedule", "dropout", "truncated"])
def test_each_step_is_differentiated_as_done(optimizer: str, setting: str) -> None:
    """Each step has its own dropout mask."""
    done = 5 if setting == "truncated" else 3
    actual = trained(made(optimizer, setting), 2, done, "unrolled:steps=3")
    assert_slope(actual, slopes(partial(made, optimizer, setting), 3, before=done - 1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_outside_training_steps_are_simulated(optimizer: str) -> None:
    """F is differentiated at the current point, on which the optimizer's state depends."""

    def advanced() -> Any:
        upper, lower = made(optimizer)
        for _ in range(2):
            lower.step(lower.gradient(lower.next_batch(), lower.variables).gradient)
        batch = lower.peek_batch()
        lower.next_batch = lambda: batch
        return upper, lower

    upper, lower = advanced()
    u, w = upper.variables, lower.variables
    direct = flat(torch.autograd.grad(upper_f(w, u), u, materialize_grads=True))
    b = flat(torch.autograd.grad(upper_f(w, u), w))
    implicit = slopes(advanced, 3, value=lambda _, lower: flat(lower.variables) @ b)
    assert_slope(flat(hypergradient(upper, lower, "unrolled:steps=3")), direct + implicit)
    assert implicit.norm() > 0.01 * direct.norm()


def test_graphs_of_two_steps_are_never_held_at_once() -> None:
    """Another step adds what is recorded of it, here 3 vectors of 4 numbers, and no graph."""

    def held(steps: int) -> int:
        x = torch.linspace(-1, 1, 40_000, dtype=torch.float64).reshape(-1, 4)
        w = torch.ones(4, dtype=torch.float64, requires_grad=True)
        u = torch.ones((), dtype=torch.float64, requires_grad=True)

        def f(_: Any) -> Tensor:
            return (torch.tanh(x @ w) * u).exp().square().mean()

        upper = FunctionLevel(lambda _: w.square().sum(), [u], lr=0.1)
        lower = FunctionLevel(f, [w], optimizer=SGD([w], lr=0.1, momentum=0.9))
        engine = Engine(upper, lower, f"unrolled:steps={steps}", lower_steps=steps, progress=False)
        engine.run(1)
        return peak_memory(lambda: engine.run(1), torch.device("cpu"))

    few, many = held(2), held(12)
    assert few > 5 * 8 * 10_000  # the graph of one step
    assert many - few < 10 * 3 * 4 * 8 + 1000


@pytest.mark.parametrize(("xi", "lr"), [("0", 0.05), ("lr", 0.05), ("lr", torch.tensor(0.05))])
def test_xi_is_zero_or_the_learning_rate(xi: str, lr: float | Tensor) -> None:
    quadratic = program(0)
    upper, lower = quadratic.levels()
    lower.optimizer.param_groups[0]["lr"] = lr
    actual = flat(hypergradient(upper, lower, f"darts:xi={xi}"))
    expected = quadratic.direct + quadratic.implicit((xi == "lr") * 0.05 * quadratic.b)
    torch.testing.assert_close(actual, expected)


def test_the_learning_rate_must_be_one() -> None:
    w, u = start()
    groups = [{"params": [w[0]], "lr": 0.1}, {"params": [w[1]], "lr": 0.2}]
    upper, lower = make_levels(SGD(groups), w, u)
    with pytest.raises(ProblemError, match=r"darts: xi=\"lr\".*0.2"):
        hypergradient(upper, lower, "darts:xi=lr")
    lower.optimizer = None
    with pytest.raises(ProblemError, match=r'darts: xi="lr".*optimizer'):
        hypergradient(upper, lower, "darts:xi=lr")


@pytest.mark.parametrize("tensor", [False, True])
def test_in_training_the_product_is_taken_where_the_last_lower_step_began(tensor: bool) -> None:
    """−ξ·∂²f/∂u∂w(w₀) · ∂F/∂w(w₁), with that step's rate for ξ; a schedule moves a ``tensor``."""
    w, u = start()
    optimizer = SGD(w, lr=torch.tensor(0.4, dtype=torch.float64) if tensor else 0.4)
    upper, lower = make_levels(optimizer, w, u, scheduler=ExponentialLR(optimizer, 0.5))
    before = flat(u).detach()
    Engine(upper, lower, "darts:xi=lr,product=exact", warmup_steps=1, progress=False).run(1)
    actual = before - flat(u).detach()

    def gradient(step: int, w: list[Tensor], u: list[Tensor]) -> tuple[Tensor, ...]:
        batch = lower.batches.data[step]
        return torch.autograd.grad(f(w, u, batch), w, create_graph=True)

    w, u = start()
    w = [x.detach() - 0.4 * g.detach() for x, g in zip(w, gradient(0, w, u))]
    w = [x.requires_grad_() for x in w]
    at_start = gradient(1, w, u)
    w = [(x - 0.2 * g).detach().requires_grad_() for x, g in zip(w, at_start)]
    direct = torch.autograd.grad(upper_f(w, u), u, materialize_grads=True)
    b = torch.autograd.grad(upper_f(w, u), w)
    mixed = torch.autograd.grad(at_start, u, b)
    torch.testing.assert_close(actual, flat(direct) - 0.2 * flat(mixed), rtol=1e-9, atol=1e-12)
