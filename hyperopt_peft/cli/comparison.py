"""Means, standard errors and paired differences of runs, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from transformers import EvalPrediction

DRAWS = 200

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        method: the name of the method.
        seed: the seed of the start, the split and the order of examples.
        metrics: the metrics of the evaluation, by name.
        draws: the compared metric on `DRAWS` bootstrap samples of the test rows, the same samples
            for every run, so that runs can be compared draw by draw; shape (DRAWS,).
        seconds: the time of training in seconds.
        trainable_parameters: the number of trained parameters.
        steps: the number of optimizer steps.
    """

    method: str
    seed: int
    metrics: dict[str, float]
    draws: Numbers = field(repr=False)
    seconds: float
    trainable_parameters: int
    steps: int

    def record(self) -> dict[str, Any]:
        """Plain values for JSON, with the standard deviation of the draws instead of the draws."""
        return {**asdict(self), "draws": None, "test_standard_error": float(self.draws.std())}


@dataclass(frozen=True)
class Row:
    """One method, over its seeds.

    Attributes:
        method: the name of the method.
        metrics: the means over the seeds.
        spread: the sample standard deviation of the compared metric over the seeds; None for one
            seed.
        standard_error: the standard error of the compared metric's mean; see `mean_and_error`.
        difference: the mean difference to the first method, paired by seed and test row; None for
            the first method.
        difference_error: the standard error of ``difference``.
        seconds: the mean time of training in seconds.
        trainable_parameters: the number of trained parameters.
        steps: the number of optimizer steps.
    """

    method: str
    metrics: dict[str, float]
    spread: float | None
    standard_error: float
    difference: float | None
    difference_error: float | None
    seconds: float
    trainable_parameters: int
    steps: int


def bootstrap(metric: Callable[[Any], float], predictions: Any, labels: Any) -> Numbers:
    """``metric`` on `DRAWS` samples with replacement of the test rows, the same at every call.

    The standard deviation of the result, of shape (DRAWS,), is the standard error of the metric as
    an estimate for the population of the test rows (Efron 1979, doi:10.1214/aos/1176344552).
    """
    rows = np.random.default_rng(0).integers(len(labels), size=(DRAWS, len(labels)))
    return np.array([metric(EvalPrediction(predictions[own], labels[own])) for own in rows])


def mean_and_error(values: Sequence[float], draws: Sequence[Numbers]) -> tuple[float, float]:
    """The mean over k seeds and its standard error, √(s²/k + e²).

    s is the sample standard deviation over the seeds (0 for one seed), and e the standard deviation
    over bootstrap draws of the mean over the seeds, which share the test rows.
    """
    over_seeds = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    over_rows = float(np.nanvar(np.mean(draws, axis=0)))
    return float(np.mean(values)), math.sqrt(over_seeds + over_rows)


def summarise(runs: Sequence[Run], metric: str) -> list[Row]:
    """A row for each method, in the order of ``runs``; differences are to the first method."""
    rows = []
    methods = list(dict.fromkeys(run.method for run in runs))
    first = {run.seed: run for run in runs if run.method == methods[0]}
    for method in methods:
        own = [run for run in runs if run.method == method]
        values = [run.metrics[metric] for run in own]
        _, error = mean_and_error(values, [run.draws for run in own])
        difference, difference_error = mean_and_error(
            [run.metrics[metric] - first[run.seed].metrics[metric] for run in own],
            [run.draws - first[run.seed].draws for run in own],
        )
        rows.append(
            Row(
                method,
                {
                    name: float(np.mean([run.metrics[name] for run in own]))
                    for name in own[0].metrics
                },
                spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
                standard_error=error,
                difference=None if method == methods[0] else difference,
                difference_error=None if method == methods[0] else difference_error,
                seconds=float(np.mean([run.seconds for run in own])),
                trainable_parameters=own[0].trainable_parameters,
                steps=own[0].steps,
            )
        )
    return rows


def markdown(rows: Sequence[Row], metric: str, others: Sequence[str], seeds: int, size: int) -> str:
    """The table, and a line about its standard errors.

    Args:
        rows: the methods.
        metric: the compared metric.
        others: further metrics.
        seeds: the number of seeds.
        size: the number of test rows.
    """
    title = metric.removeprefix("eval_")
    heads = ["method", title, f"difference to {rows[0].method}"]
    heads += [name.removeprefix("eval_") for name in others]
    heads += ["seconds", "trainable parameters", "steps"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        difference = "–"
        if row.difference is not None and row.difference_error is not None:
            difference = f"{row.difference:+.4f} ± {row.difference_error:.4f}"
        lines.append(
            [
                row.method,
                f"{row.metrics[metric]:.4f} ± {row.standard_error:.4f}",
                difference,
                *(f"{row.metrics[name]:.4f}" for name in others),
                f"{row.seconds:.1f}",
                str(row.trainable_parameters),
                str(row.steps),
            ]
        )
    of = (
        "of the test rows and of the seeds"
        if seeds > 1
        else "of the test rows; one seed shows none"
    )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"{table}\n\nMeans of {seeds} seed{'s' * (seeds > 1)} on {size} test rows; ± is one "
        f"standard error, {of}. Differences are paired by seed and row."
    )


def picture(
    runs: Sequence[Run], rows: Sequence[Row], metric: str, lower_is_better: bool, path: Path
) -> None:
    """A column for each method: a dot for each run, a bar for mean and standard error."""
    figure = Figure(figsize=(max(4.0, 1.6 * len(rows)), 4), layout="constrained")
    axes = figure.add_subplot()
    for column, row in enumerate(rows):
        values = [run.metrics[metric] for run in runs if run.method == row.method]
        axes.scatter([column] * len(values), values, s=30, color=f"C{column}", alpha=0.6)
        bar = row.standard_error if math.isfinite(row.standard_error) else 0.0
        mean = row.metrics[metric]
        axes.errorbar(column + 0.15, mean, bar, fmt="_", markersize=12, color=f"C{column}")
    names = [row.method.replace(":", ":\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize="small")
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylabel(f"{metric} ({'lower' if lower_is_better else 'higher'} is better)")
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=150)
