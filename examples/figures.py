"""The pictures of the text classification example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator
from scipy import stats

from hyperopt_peft.adapters import ModuleChange
from hyperopt_peft.diagnostics.compare import Comparison
from hyperopt_peft.utils.plots import COLOURS, drawing


@dataclass(frozen=True)
class Curve:
    """Losses of training batches; the first at step ``start``, then one every ``stride`` steps."""

    losses: Sequence[float]
    start: int = 0
    stride: int = 1


def learning_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Losses against the steps of adapter and head, smoothed over a tenth of each curve."""
    with drawing(path, 7, 4) as (_, axes):
        for name, curve in curves.items():
            width = max(1, len(curve.losses) // 10)
            smooth = np.convolve(curve.losses, np.ones(width) / width, mode="valid")
            steps = curve.start + curve.stride * (np.arange(len(smooth)) + width)
            axes.plot(steps, smooth, "--" if "upper" in name else "-", label=name)
        axes.set_xlabel("optimizer step of adapter and head")
        axes.set_ylabel("loss on training batches")
        axes.legend()


def estimators(comparison: Comparison, path: Path) -> None:
    """Cosine to the reference against cost, in seconds, an estimator a point."""
    rows = [row for row in comparison.rows if not row.problem and np.isfinite(row.cosine)]
    with drawing(path, 7, 5) as (figure, axes):
        for index, row in enumerate(rows):
            label = f"{row.estimator} ({row.gradients} + {row.products})"
            style = {"color": COLOURS[index % len(COLOURS)], "marker": "os"[index >= len(COLOURS)]}
            axes.scatter(row.seconds, row.cosine, s=60, zorder=3, label=label, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel("seconds for one hypergradient")
        axes.set_ylabel("cosine to the reference")
        axes.set_title(f"reference: {comparison.reference}")
        title = "estimator (forward+backward + second backward passes)"
        figure.legend(title=title, loc="outside lower center", ncols=2)


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
