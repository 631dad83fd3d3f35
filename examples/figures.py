"""The pictures of the text classification example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hyperopt_peft.diagnostics.compare import Comparison


@dataclass(frozen=True)
class Curve:
    """Losses of training batches; the first at step ``start``, then one every ``stride`` steps."""

    losses: Sequence[float]
    start: int = 0
    stride: int = 1


def learning_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Losses against the steps of adapter and head, smoothed over a tenth of each curve."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        width = max(1, len(curve.losses) // 10)
        smooth = np.convolve(curve.losses, np.ones(width) / width, mode="valid")
        steps = curve.start + curve.stride * (np.arange(len(smooth)) + width)
        axes.plot(steps, smooth, "--" if "upper" in name else "-", label=name)
    axes.set_xlabel("optimizer step of adapter and head")
    axes.set_ylabel("loss on training batches")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def estimators(comparison: Comparison, path: Path) -> None:
    """Cosine to the reference against cost, in seconds, an estimator a point."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in comparison.rows if not row.problem and np.isfinite(row.cosine)]
    for index, row in enumerate(rows):
        passes = f"{row.gradients} + {row.products}"
        axes.scatter(row.seconds, row.cosine, s=60, color=f"C{index}", zorder=3)
        axes.plot([], [], "o", color=f"C{index}", label=f"{row.method} ({passes})")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("seconds for one hypergradient")
    axes.set_ylabel("cosine to the reference")
    axes.set_title(f"reference: {comparison.reference}", fontsize="medium")
    axes.grid(alpha=0.25)
    figure.legend(
        title="estimator (forward+backward + second backward passes)",
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize="small",
    )
    figure.savefig(path, dpi=150)
