"""The pictures of the text classification example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from hyperopt_peft.adapters import ModuleChange
from hyperopt_peft.diagnostics.compare import Comparison
from hyperopt_peft.utils.plots import COLOURS, drawing, lines, points, smooth


@dataclass(frozen=True)
class Curve:
    """Losses of training batches; the first at step ``start``, then one every ``stride`` steps."""

    losses: Sequence[float]
    start: int = 0
    stride: int = 1


def learning_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Losses against the steps of adapter and head, smoothed over a tenth of each curve."""
    smoothed = {
        name: smooth(curve.start + curve.stride * (np.arange(len(curve.losses)) + 1), curve.losses)
        for name, curve in curves.items()
    }
    xlabel, ylabel = "optimizer step of adapter and head", "loss on training batches"
    lines({"": smoothed}, path, xlabel=xlabel, ylabel=ylabel)


def estimators(comparison: Comparison, path: Path) -> None:
    """The relative error of each estimator against its passes."""
    rows = [row for row in comparison.rows if not row.problem and np.isfinite(row.relative_error)]
    points(
        {row.estimator: (row.gradients + row.products, row.relative_error) for row in rows},
        path,
        xlabel="passes for one hypergradient: forward+backward and second backward",
        ylabel=f"relative error to {comparison.reference}",
        xscale="log",
        yscale="log",
    )


def decomposition(changes: Mapping[str, Sequence[ModuleChange]], path: Path) -> None:
    """ΔM against ΔD, a point a layer, with the least-squares line of each method.

    In full fine-tuning the slope is negative, in LoRA positive (arXiv:2402.09353, §3.2).
    """
    with drawing(path, 7, 5) as (_, axes):
        for colour, (method, points) in zip(COLOURS, changes.items(), strict=False):
            x = [point.delta_direction for point in points]
            y = [point.delta_magnitude for point in points]
            line = stats.linregress(x, y)
            half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
            label = f"{method}: slope {line.slope:.3g} ± {half:.2g}, r {line.rvalue:.2f}"
            axes.scatter(x, y, s=22, color=colour, alpha=0.7)
            ends = np.array([min(x), max(x)])
            axes.plot(ends, line.intercept + line.slope * ends, color=colour, label=label)
        axes.set_xlabel("ΔD: mean over rows of 1 − cos(V, W0)")
        axes.set_ylabel("ΔM: mean over rows of |m − m0|")
        axes.ticklabel_format(style="sci", scilimits=(-3, 3), useMathText=True)
        axes.legend(title="least-squares line with 95 % interval")
