"""The least that a bilevel iteration takes: the same passes and optimizer steps in bare PyTorch.

    python benchmarks/speed floor       # CPU seconds of one thread, some five minutes

Each iteration of the package stands beside one by hand, which checks nothing, records nothing and
replays no random numbers. *Steps* and *MLP* are those of ``timing``, in the same units.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import cross_entropy

from benchmarks.measure import arguments, interleaved, keep_memory, ratio, report
from benchmarks.minilm import batches, bidora, minilm
from benchmarks.speed.mlp import batch, engine, networks, weighted_loss
from benchmarks.speed.timing import FORWARD, ITERATIONS, UNIT, Row, Run, dora_step
from hyperopt_peft.adapters import split_parameters

Loss = Callable[[], Tensor]
Parts = Sequence[Tensor]


def step(optimizer: torch.optim.Optimizer, gradient: Parts, limit: float | None = None) -> None:
    """A step of ``optimizer`` along ``gradient``, clipped to ``limit``."""
    variables = [x for group in optimizer.param_groups for x in group["params"]]
    for variable, part in zip(variables, gradient, strict=True):
        variable.grad = part
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(variables, limit)
    optimizer.step()
    optimizer.zero_grad()


def darts(w: Parts, u: Parts, moves: Any, upper: Loss, lower: Loss) -> list[Tensor]:
    """The last lower step, ``moves`` by ∂f/∂w, and dF/du by a forward difference from before it."""
    start = [x.detach().clone() for x in w]
    gradient = grad(lower(), [*w, *u])
    moves(gradient[: len(w)])
    above = grad(upper(), [*u, *w], materialize_grads=True)
    direct, b = above[: len(u)], above[len(u) :]
    with torch.no_grad():
        length = 1e-3 / torch.stack(torch._foreach_norm(b)).norm()
        now = [x.clone() for x in w]
        for variable, value, along in zip(w, start, b, strict=True):
            torch.add(value, along * length, out=variable)
    ahead = grad(lower(), u)
    with torch.no_grad():
        torch._foreach_copy_(list(w), now)
        triples = zip(direct, ahead, gradient[len(w) :], strict=True)
        return [d - (x - y) / length for d, x, y in triples]


def cg5(w: Parts, u: Parts, upper: Loss, lower: Loss) -> list[Tensor]:
    """The implicit term by five steps with damping 1 through one graph of ∂f/∂w."""
    slopes = grad(lower(), w, create_graph=True)
    r = flat(grad(upper(), w))
    v, p, square = torch.zeros_like(r), r.clone(), r @ r
    sizes = [x.numel() for x in w]

    def product(of: Parts, x: Tensor) -> tuple[Tensor, ...]:
        parts = [part.view_as(y) for part, y in zip(x.split(sizes), w, strict=True)]
        return grad(slopes, of, parts, retain_graph=True)

    for _ in range(5):
        q = flat(product(w, p)) + p
        alpha = square / (p @ q)
        v, r, before = v + alpha * p, r - alpha * q, square
        square = r @ r
        p = r + square / before * p
    return [-part for part in product(u, v)]


def flat(parts: Parts) -> Tensor:
    """All entries, ``(n,)``."""
    return torch.cat([part.reshape(-1) for part in parts])


def mlp_by_hand(name: str) -> Run:
    """An iteration of `mlp` with the estimator ``name`` of `ITERATIONS`."""
    net, weigher = networks()
    (x, y), (clean, labels) = batch(0), batch(1)
    w, u = list(net.parameters()), list(weigher.parameters())
    below, above = torch.optim.SGD(w, lr=0.01), torch.optim.SGD(u, lr=0.01)

    def lower() -> Tensor:
        return weighted_loss(net(x), y, weigher)

    def upper() -> Tensor:
        return cross_entropy(net(clean), labels)

    def run() -> None:
        if name == "darts":
            step(above, darts(w, u, partial(step, below), upper, lower))
            return
        step(below, grad(lower(), w))
        if name == "cg5":
            step(above, cg5(w, u, upper, lower))
        else:
            upper()  # which reads no u

    return run


def bidora_by_hand(data: list[Any], above: list[Any], count: int) -> Run:
    """``count`` lower steps of BiDoRA and an upper one by darts."""
    model = minilm("fast full")
    parts = split_parameters(model)
    w, u = [*parts.directions.values(), *parts.rest.values()], [*parts.magnitudes.values()]
    lower = torch.optim.AdamW(w, lr=1e-4)
    upper = torch.optim.AdamW(u, lr=1e-4, weight_decay=0.0)
    below, beyond = cycle(data), cycle(above[::-1])

    def loss(one: Any) -> Tensor:
        value: Tensor = model(**one).loss
        return value

    def run() -> None:
        for _ in range(count - 1):
            step(lower, grad(loss(next(below)), w), 1.0)
        one, other = next(below), next(beyond)
        moves = partial(step, lower, limit=1.0)
        step(upper, darts(w, u, moves, partial(loss, other), partial(loss, one)), 1.0)

    return run


def rows(runs: dict[str, Run], unit: str, repeats: int) -> list[Row]:
    """A row for each run."""
    seconds = interleaved(runs, repeats, clock=time.process_time)
    return [
        {
            "run": name,
            "CPU ms": 1e3 * statistics.median(each),
            f"÷ {unit}": ratio(seconds, name, unit),
        }
        for name, each in seconds.items()
    ]


def main() -> None:
    """Measure, print, and write JSON where asked for."""
    options = arguments("the floors of steps and of the MLP's iteration, by hand")
    torch.set_num_threads(1)
    keep_memory()
    size, length = (4, 8) if options.quick else (32, 64)
    data = batches(4, size, length)
    quarter = [{name: x[: size // 4] for name, x in each.items()} for each in data]
    steps: dict[str, Run] = {UNIT: dora_step("PEFT DoRA", data, "cpu")}
    for count, name, above in ((1, "full", data), (1, "quarter", quarter), (4, "quarter", quarter)):
        search = bidora(minilm("fast full"), data, above[::-1], FORWARD, lower_steps=count)
        title = f"BiDoRA {count}:1, {name} upper batch, darts"
        steps[title] = partial(search.run, 1)
        steps[f"{title}, by hand"] = bidora_by_hand(data, above, count)
    net, weigher = networks()
    (x, y), w = batch(0), list(net.parameters())
    mlp: dict[str, Run] = {"G": lambda: grad(weighted_loss(net(x), y, weigher), w)}
    for name, estimator in ITERATIONS.items():
        mlp[name] = partial(engine(estimator).run, 1)
        mlp[f"{name}, by hand"] = mlp_by_hand(name)
    tables = {
        "Steps": rows(steps, UNIT, 1 if options.quick else 3),
        "MLP, upper iteration": rows(mlp, "G", 5 if options.quick else 50),
    }
    report(options, tables)
