"""What do minibatches do to an estimator?

    python benchmarks/estimators noise --json noise.json

Digits hyper-cleaning (problem B): the lower level has 800 noisy images, the upper level 400 clean
ones, at a minimum of the lower level. Each estimate draws new batches of 64 from the lower data,
the upper data, or both; the reference is the exact hypergradient of all data. A lower batch has
gradients only for the weights of its own images, 800/64 times too large. So an estimate is compared
with the reference on the images of its batch, times 64/800, and v ≈ H⁻¹b is the only error left.

*error*: the median error of one estimate. *bias*: the error of the mean over all draws; an unbiased
estimator has on average the *sampling error* (more, if estimates depend on earlier ones).
*spread*: the standard deviation over the draws. All are in units of the norm of the reference. An
estimator with a state first runs into its steady state.

The last table trains both levels in batches of 64, then minimises the lower level on all of its
data. F, its range over the seeds, and the accuracy on test images are those of that minimum.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.measure import Target, arguments, report
from hyperopt_peft import Engine, NonFiniteError, Problem, ProblemError, hypergradient
from hyperopt_peft.core.data import DataStream
from hyperopt_peft.hypergradients import get_estimator, registered
from hyperopt_peft.hypergradients.estimate import check_estimator, open_oracle
from hyperopt_peft.hypergradients.oracle import State
from hyperopt_peft.problems.textbook.hypercleaning import CleanImages, WeightedImages, digits

SIZE = 64  # of a batch
SKIPPED = {"exact"}  # one product for each of 640 unknowns; a long cg is the same solution
OPTIONS = (
    "darts:xi=lr",
    "cg:steps=3",
    "cg:damping=0.1",
    "neumann:terms=5",
    "unrolled:steps=10",
    "warm:decay=0",
    "warm:decay=0,step_size=0.5",
    "warm:decay=0,step_size=0.15",
    "warm:decay=1",
    "warm:steps=5",
)
Row = dict[str, Any]


class LowerRows(WeightedImages):
    """The lower level on the images of a batch of row numbers; None stands for all."""

    def loss(self, batch: Tensor | None) -> Tensor:
        """Mean σ(x_i) CE_i over the batch + 0.02 ‖W‖²."""
        rows = slice(None) if batch is None else batch
        each = cross_entropy(self.data.x[rows] @ self.w, self.data.y[rows], reduction="none")
        weights = self.sample_logits[rows].sigmoid()
        return (weights * each).mean() + 0.02 * self.w.square().sum()


class UpperRows(CleanImages):
    """The upper level on the clean images of a batch of row numbers; None stands for all."""

    def loss(self, batch: Tensor | None) -> Tensor:
        """Mean CE over the batch."""
        rows = slice(None) if batch is None else batch
        return cross_entropy(self.data.x_val[rows] @ self.w, self.data.y_val[rows])


def levels() -> tuple[UpperRows, LowerRows]:
    """Both levels at their initial values W = x = 0, with shuffled batches of row numbers."""
    _, below = digits()
    upper = UpperRows(below.sample_logits, below.w, below.data)
    lower = LowerRows(below.w, below.sample_logits, below.data)
    for level, labels in ((upper, below.data.y_val), (lower, below.data.y)):
        rows: Any = torch.arange(len(labels))
        loader = DataLoader(rows, batch_size=SIZE, shuffle=True, drop_last=True)
        level.batches = DataStream(loader, level.name)
    return upper, lower


def minimise(lower: Problem) -> None:
    """Move the lower variables to the minimum on all data."""
    descent = torch.optim.LBFGS(
        lower.variables, max_iter=1000, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        descent.zero_grad()
        loss, _ = lower.evaluate(None)
        loss.backward(inputs=list(lower.variables))
        return loss

    descent.step(closure)  # type: ignore[no-untyped-call]
    descent.zero_grad()


@dataclass(frozen=True)
class Draws:
    """Which levels draw a batch for each estimate, and from how many rows."""

    lower: int | None
    upper: int | None

    def draw(self, random: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """Row numbers of a lower and an upper batch; None stands for all data."""
        rows = [
            None if size is None else torch.randperm(size, generator=random)[:SIZE]
            for size in (self.lower, self.upper)
        ]
        return rows[0], rows[1]


def noise(
    method: str, upper: Problem, lower: Problem, draws: Draws, count: int, settle: int
) -> Row:
    """Error, bias and spread of ``method`` over ``count`` draws of the batches."""
    check_estimator(get_estimator(method), upper, lower)
    (exact,) = hypergradient(upper, lower, "exact", upper_batch=None, lower_batch=None)
    random = torch.Generator().manual_seed(0)
    state: State = {}
    errors = []
    total, squares, seen = (torch.zeros_like(exact) for _ in range(3))
    k = 0
    while k < count:
        below, above = draws.draw(random)
        oracle = open_oracle(upper, lower, upper_batch=above, lower_batch=below)
        oracle.state = state
        result = oracle.estimate(get_estimator(method))
        if result.state and not state:
            k -= settle
        state = result.state
        k += 1
        if k <= 0:
            continue
        (value,) = result.hypergradient
        rows = slice(None) if below is None else below
        value = value[rows] * (1 if below is None else SIZE / len(exact))
        errors.append(float((value - exact[rows]).norm() / exact[rows].norm()))
        total[rows] += value
        squares[rows] += value.square()
        seen[rows] += 1
    drawn = seen > 0
    exact, seen = exact[drawn], seen[drawn]
    mean = total[drawn] / seen
    variance = (squares[drawn] / seen - mean.square()).clamp(min=0)
    unit = exact.norm()
    return {
        "estimator": method,
        "error": statistics.median(errors),
        "bias": float((mean - exact).norm() / unit),
        "sampling error": float((variance / seen).sum().sqrt() / unit),
        "spread": float(variance.sum().sqrt() / unit),
    }


def training(method: str, steps: int, seeds: int) -> Row:
    """Both levels trained in batches for ``steps`` upper steps, after 100 lower ones."""
    losses, accuracies, true, redrawn = [], [], [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        upper, lower = levels()
        Engine(upper, lower, method, warmup_steps=100, progress=False).run(steps)
        minimise(lower)
        losses.append(float(upper.evaluate(None)[0].detach()))
        accuracies.append(upper.test_accuracy())
        weights = upper.variables[0].detach().sigmoid()
        true.append(float(weights[~lower.data.redrawn].mean()))
        redrawn.append(float(weights[lower.data.redrawn].mean()))
    return {
        "estimator": method,
        "F at the minimum": statistics.fmean(losses),
        "least": min(losses),
        "greatest": max(losses),
        "test accuracy": statistics.fmean(accuracies),
        "weight of true labels": statistics.fmean(true),
        "of redrawn ones": statistics.fmean(redrawn),
    }


def rows_of(measure: Callable[[str], Row], methods: Sequence[str], title: str) -> list[Row]:
    """A row for each method; methods that fail are printed and left out."""
    rows = []
    for method in methods:
        try:
            rows.append(measure(method))
        except (ProblemError, NonFiniteError) as error:
            print(f"{title}: no {method}: {error}", flush=True)
    return rows


def main() -> None:
    """Measure and print; write JSON if asked to."""
    options = arguments("error, bias and spread of the estimators under minibatch noise")
    count, settle, steps, seeds = (60, 40, 60, 1) if options.quick else (250, 250, 300, 3)
    methods = sorted({*registered(), *OPTIONS} - SKIPPED)
    upper, lower = levels()
    minimise(lower)
    tables = {}
    for title, draws in {
        "Batches of the lower data": Draws(800, None),
        "Batches of the upper data": Draws(None, 400),
        "Batches of both": Draws(800, 400),
    }.items():
        measure = partial(noise, upper=upper, lower=lower, draws=draws, count=count, settle=settle)
        tables[f"{title}, {count} draws"] = rows_of(measure, methods, title)
    title = f"Trained in batches of both, {steps} upper steps of one lower step, {seeds} seeds"
    tables[title] = rows_of(partial(training, steps=steps, seeds=seeds), methods, title)
    targets: list[Target] = []
    report(options, tables, targets, {"batch size": SIZE})
