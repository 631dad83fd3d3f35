"""What do minibatches do to an estimator?

    python benchmarks/estimators noise --json noise.json

Digits hyper-cleaning (problem B): the lower level has 800 noisy images, the upper level 400 clean
ones. Both levels are trained in batches of 64, then the lower level is minimised on all of its
data. F, its range over the seeds, and the accuracy on test images are those of that minimum.

`noise` is for `comparison`. Each estimate at a minimum of the lower level draws new batches of both
levels; the reference is the exact hypergradient of all data. A lower batch has gradients only for
the weights of its own images, 800/64 times too large. So an estimate is compared with the reference
on the images of its batch, times 64/800, and v ≈ H⁻¹b is the only error left. *error*: the median
error of one estimate. *bias*: the error of the mean over all draws. *spread*: the standard
deviation over the draws. All are in units of the norm of the reference. An estimator with a state
first runs into its steady state.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.measure import arguments, report
from hyperopt_peft import Engine, hypergradient
from hyperopt_peft.core.data import DataStream
from hyperopt_peft.engine import minimize
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.hypergradients.estimate import check_estimator, open_oracle
from hyperopt_peft.hypergradients.oracle import State
from hyperopt_peft.problems.textbook.hypercleaning import CleanImages, WeightedImages, digits

SIZE = 64  # of a batch
METHODS = ["warm", "cg", "darts"]
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


def noise(method: str, upper: UpperRows, lower: LowerRows, count: int, settle: int) -> Row:
    """Error, bias and spread of ``method`` over ``count`` draws of the batches."""
    check_estimator(get_estimator(method), upper, lower)
    (exact,) = hypergradient(upper, lower, "exact", upper_batch=None, lower_batch=None)
    random = torch.Generator().manual_seed(0)
    sizes = len(lower.data.y), len(upper.data.y_val)
    state: State = {}
    errors = []
    total, squares, seen = (torch.zeros_like(exact) for _ in range(3))
    k = 0
    while k < count:
        rows, above = (torch.randperm(size, generator=random)[:SIZE] for size in sizes)
        oracle = open_oracle(upper, lower, upper_batch=above, lower_batch=rows)
        oracle.state = state
        result = oracle.estimate(get_estimator(method))
        if result.state and not state:
            k -= settle
        state = result.state
        k += 1
        if k <= 0:
            continue
        (value,) = result.hypergradient
        value = value[rows] * SIZE / len(exact)
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
        "error": statistics.median(errors),
        "bias": float((mean - exact).norm() / unit),
        "spread": float(variance.sum().sqrt() / unit),
    }


def training(method: str, steps: int, seeds: int) -> Row:
    """Both levels trained in batches for ``steps`` upper steps, after 100 lower ones."""
    losses, accuracies = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        upper, lower = levels()
        Engine(upper, lower, method, warmup_steps=100, progress=False).run(steps)
        minimize(lower)
        losses.append(float(upper.evaluate(None)[0].detach()))
        accuracies.append(upper.test_accuracy())
    return {
        "estimator": method,
        "F at the minimum": statistics.fmean(losses),
        "least": min(losses),
        "greatest": max(losses),
        "test accuracy": statistics.fmean(accuracies),
    }


def main() -> None:
    """Measure and print; write JSON if asked to."""
    options = arguments("the minimum that minibatches reach with some estimators", methods=METHODS)
    steps, seeds = (60, 1) if options.quick else (300, 3)
    title = f"Trained in batches of both, {steps} upper steps of one lower step, {seeds} seeds"
    rows = [training(method, steps, seeds) for method in options.methods]
    report(options, {title: rows}, {"batch size": SIZE})
