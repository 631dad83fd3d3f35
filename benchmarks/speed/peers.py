"""The problem of `benchmarks.speed.mlp` in other libraries, and in the plainest loops.

Each function returns one iteration (a lower step, a hypergradient, an upper step), ready to be
called again and again. Betty and TorchOpt are imported where they are used.

Betty's wheel refuses newer interpreters, so it is installed on its own:
``pip install --no-deps --ignore-requires-python betty-ml==0.2.1``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.speed.mlp import batch, networks, weighted_loss

Iteration = Callable[[], object]


def betty(method: str, **options: Any) -> Iteration:
    """Betty 0.2.1; ``options`` are fields of its Config."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return weighted_loss(self.module(batch[0]), batch[1], self.upper.module)

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self.lower.module(batch[0]), batch[1])

    def problem(kind: type, module: Any, data: Any, config: Any, name: str) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        return kind(
            name=name, module=module, optimizer=optimizer, train_data_loader=[data], config=config
        )

    net, weigher = networks()
    lower = problem(Lower, net, batch(0), Config(type=method, unroll_steps=1, **options), "lower")
    upper = problem(Upper, weigher, batch(1), Config(type=method, retain_graph=True), "upper")
    logging.disable(logging.INFO)  # Betty announces every problem
    engine = Engine(
        config=EngineConfig(train_iters=1),
        problems=[upper, lower],
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    engine.train()
    logging.disable(logging.NOTSET)

    def iteration() -> None:
        engine.global_step += 1
        engine.train_step()

    return iteration


def torchopt_root(steps: int) -> Iteration:
    """TorchOpt's implicit root, with its conjugate gradients on the Hessian."""
    import torchopt

    warnings.filterwarnings("ignore", module="torchopt")  # it calls torch.func by its old name
    net, weigher = networks()
    (x, y), (x_upper, y_upper) = batch(0), batch(1)
    names, weights = zip(*weigher.named_parameters())
    optimizer = torch.optim.SGD(weights, lr=0.01)
    keys = [name for name, _ in net.named_parameters()]
    state = tuple(p.detach() for p in net.parameters())

    def loss(w: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Tensor:
        logits = functional_call(net, dict(zip(keys, w)), (x,))
        losses = cross_entropy(logits, y, reduction="none")[:, None]
        return (functional_call(weigher, dict(zip(names, u)), (losses.detach(),)) * losses).mean()

    stationarity = torch.func.grad(loss)
    solver = torchopt.linear_solve.solve_cg(maxiter=steps, rtol=0.0, atol=0.0, ridge=1.0)

    @torchopt.diff.implicit.custom_root(stationarity, argnums=1, solve=solver)  # type: ignore[untyped-decorator,unused-ignore]
    def lower_step(w: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gradient = stationarity(w, u)
        return tuple(p.detach() - 0.01 * g for p, g in zip(w, gradient))

    def iteration() -> None:
        nonlocal state
        optimum = lower_step(state, weights)
        logits = functional_call(net, dict(zip(keys, optimum)), (x_upper,))
        cross_entropy(logits, y_upper).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = tuple(p.detach() for p in optimum)

    return iteration


def plain_loop(method: str, steps: int = 5) -> Iteration:
    """Fixed-point or conjugate-gradient products, or two-sided DARTS, as short as they can be.

    As in hypertorch: one kept graph, no checks, no dropout, no restoring beyond the weights.
    """
    net, weigher = networks()
    w, u = list(net.parameters()), list(weigher.parameters())
    lower, upper = (torch.optim.SGD(p, lr=0.01) for p in (w, u))
    (x, y), (x_upper, y_upper) = batch(0), batch(1)

    def f() -> Tensor:
        return weighted_loss(net(x), y, weigher)

    def hypergradient() -> Sequence[Tensor]:
        b = grad(cross_entropy(net(x_upper), y_upper), w)
        if method == "darts":
            return _difference(f, w, u, b)
        gradient = grad(f(), w, create_graph=True)

        def product(v: Sequence[Tensor]) -> list[Tensor]:
            hv = grad(gradient, w, v, retain_graph=True)
            return [h + q for h, q in zip(hv, v)]  # damping 1

        v = (
            conjugate_gradients(product, b, steps)
            if method == "cg"
            else _neumann(product, b, steps)
        )
        return [-part for part in grad(gradient, u, v)]

    def iteration() -> None:
        for p, g in zip(w, grad(f(), w)):
            p.grad = g
        lower.step()
        for p, g in zip(u, hypergradient()):
            p.grad = g
        upper.step()

    return iteration


def _difference(
    f: Callable[[], Tensor], w: Sequence[Tensor], u: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    epsilon = 0.01 / torch.cat([part.flatten() for part in b]).norm()
    sides = []
    for shift in (epsilon, -2 * epsilon):
        with torch.no_grad():
            torch._foreach_add_(w, [shift * part for part in b])
        sides.append(grad(f(), u))
    with torch.no_grad():
        torch._foreach_add_(w, [epsilon * part for part in b])
    return [(n - p) / (2 * epsilon) for p, n in zip(*sides)]


def _neumann(
    product: Callable[[Sequence[Tensor]], list[Tensor]], b: Sequence[Tensor], terms: int
) -> list[Tensor]:
    p, total = list(b), list(b)
    for _ in range(terms):
        p = [x - 0.01 * y for x, y in zip(p, product(p))]
        total = [x + y for x, y in zip(total, p)]
    return [0.01 * x for x in total]


def conjugate_gradients(
    product: Callable[[Sequence[Tensor]], Sequence[Tensor]], b: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Hestenes and Stiefel's recurrence from zero, with no test of any kind."""

    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Any:
        return sum((a * c).sum() for a, c in zip(x, y))

    v, r, p = [torch.zeros_like(x) for x in b], list(b), list(b)
    rho = dot(r, r)
    for _ in range(steps):
        q = product(p)
        alpha = rho / dot(p, q)
        v = [x + alpha * y for x, y in zip(v, p)]
        r = [x - alpha * y for x, y in zip(r, q)]
        rho, previous = dot(r, r), rho
        p = [x + rho / previous * y for x, y in zip(r, p)]
    return v
