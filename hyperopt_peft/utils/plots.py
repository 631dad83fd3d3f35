"""Every figure of the library, in one style with colours that colour-blind readers distinguish.

The colours are from Okabe & Ito 2008 (https://jfly.uni-koeln.de/color/). A function that draws
returns the matplotlib figure. Unless ``path`` is None, it writes the figure to this file; the
suffix selects the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hyperopt_peft.errors import ProblemError

__all__ = ["intervals", "level_curves", "lines", "row_groups"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
BLUE, RED, GREY = COLOURS[0], COLOURS[3], "#999999"
#: The style of the first six lines, of the next six, and of the last six.
STYLES = ("-", "--", ":")
#: The entries of a history that `level_curves` draws, with their labels.
LOSSES = {"lower_loss": "lower level", "loss": "lower level"}
LOSSES |= {"upper_loss": "upper level", "eval_loss": "evaluation"}
#: The x and y values of each line, by the line's name.
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@contextmanager
def drawing(
    path: str | Path | None, width: float, height: float, *shape: int, **subplots: Any
) -> Iterator[tuple[Any, Any]]:
    """A new figure and its axes in this style, saved to ``path`` when the block ends.

    Width and height are in inches; ``shape`` and ``subplots`` are arguments of `Figure.subplots`.
    Without pyplot there is no global figure and no display.

    Raises:
        ProblemError: the file cannot be written, or its suffix names no format.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": "small",
        "savefig.dpi": 150,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(*shape, **subplots)
        if path is not None:
            try:
                figure.savefig(path)
            except (OSError, ValueError) as error:  # ValueError: an unknown format
                reason = getattr(error, "strerror", None) or error
                raise ProblemError(f"{path}: cannot be written ({reason})") from error


def lines(panels: Mapping[str, Lines], path: str | Path | None = None, **axes: Any) -> Any:
    """A panel for each title in ``panels``, one below another, with one legend at the side.

    Args:
        panels: the lines of each panel, by title; at most 18 different names of lines.
        axes: properties of all axes, such as ``xlabel``, ``ylabel`` and ``yscale``.

    Example:
        >>> figure = lines({"a run": {"loss": ([1, 2], [0.5, 0.3])}}, xlabel="step")
        >>> figure.axes[0].get_title(), figure.axes[0].get_xlabel()
        ('a run', 'step')
    """
    from cycler import cycler

    names = list(dict.fromkeys(name for named in panels.values() for name in named))
    styles = dict(zip(names, cycler(linestyle=STYLES) * cycler(color=COLOURS), strict=False))
    shown = {}
    height = min(4 * len(panels), 12)
    with drawing(path, 7.5, height, len(panels), squeeze=False) as (figure, grid):
        for panel, (title, named) in zip(grid.flat, panels.items(), strict=True):
            for name, (x, y) in named.items():
                marker = "o" if len(x) <= 12 else None
                (shown[name],) = panel.plot(x, y, marker=marker, markersize=4, **styles[name])
            panel.set(title=title, **axes)
            if panel.get_xscale() == "linear":
                panel.locator_params(axis="x", integer=True, nbins=8)
            elif "xticks" in axes:
                panel.xaxis.set_minor_formatter("")
        legend = figure.legend([*shown.values()], [*shown], loc="outside right upper")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may contain $
    return figure


def level_curves(history: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> Any:
    """The losses of both levels over a run, smoothed over a twentieth of the run.

    Args:
        history: ``Engine.history``, or ``trainer.state.log_history``.

    Example:
        >>> history = [{"upper_loss": 1 / k, "lower_loss": 2 / k} for k in range(1, 30)]
        >>> figure = level_curves(history)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['lower level', 'upper level']
    """
    records = list(history)
    curves: dict[str, tuple[Any, Any]] = {}
    for key, name in LOSSES.items():
        y = [record[key] for record in records if key in record]
        x = [record.get("step", k) for k, record in enumerate(records, 1) if key in record]
        width = max(1, round(0.05 * len(y)))
        if y:
            average = np.convolve(y, np.ones(width) / width, mode="valid")
            curves[name] = (np.asarray(x[width - 1 :]), average)
    step = "upper step" if any("lower_loss" in record for record in records) else "lower step"
    return lines({"": curves}, path, xlabel=step, ylabel="loss")


def intervals(
    rows: Mapping[str, tuple[float, float, float]], path: str | Path | None = None, label: str = ""
) -> Any:
    """A paired difference and its interval for each name, and a line at 0.

    Args:
        rows: (value, lower end, upper end) by name.
        label: the label of the values.

    Example:
        >>> figure = intervals({"DoRA": (0.02, -0.01, 0.05)}, label="accuracy − that of LoRA")
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['DoRA']
    """
    with drawing(path, 7, 1 + 0.35 * len(rows)) as (figure, panel):
        panel.axvline(0, color="black", linewidth=0.8)
        for y, (value, low, high) in enumerate(rows.values()):
            panel.plot((low, high), (y, y), color=BLUE, alpha=0.4, linewidth=5)
            panel.plot(value, y, "o", color=BLUE)
        panel.set_xlabel(label)
        panel.set_yticks(range(len(rows)), [*rows], parse_math=False)
        panel.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def row_scores(
    scores: np.ndarray[Any, Any],
    texts: Mapping[int, str],
    note: str,
    path: str | Path | None = None,
) -> Any:
    """The distribution of the scores of training rows, and the most harmful and helpful rows.

    The histogram ends at three times the 90 % quantile of the absolute scores; its outermost bars
    include the rows beyond. The bar chart is logarithmic beyond the median absolute score.

    Args:
        scores: the score of each row, ``(n,)``; NaN for a row that was never seen.
        texts: the rows to draw and their texts, from the most harmful to the most helpful.
        note: a line below the figure, about the reliability of the scores.
    """
    seen, values = scores[~np.isnan(scores)], np.array([scores[row] for row in texts])
    height = 2.5 + 0.24 * max(len(texts), 6)
    with drawing(path, 11, height, 1, 2, width_ratios=(1, 1.6)) as (figure, (left, right)):
        end = 3 * np.quantile(np.abs(seen), 0.9) or 1.0
        left.hist(seen.clip(-end, end), bins=min(40, 6 + len(seen) // 5), color=GREY)
        beyond = int((np.abs(seen) > end).sum())
        cut = f"\noutermost bars: {beyond} rows beyond" if beyond else ""
        left.set_xlabel(f"score dΦ/dv: helpful < 0 < harmful{cut}")
        left.set_ylabel("training rows")
        left.set_title(f"{len(seen)} rows, {100 * (seen > 0).mean():.0f} % of them harmful")
        left.locator_params(axis="x", nbins=4)
        places, hurting = range(len(texts)), int((values > 0).sum())
        right.barh(places, values, color=[RED if value > 0 else BLUE for value in values])
        if values.any():
            right.set_xscale("symlog", linthresh=np.median(np.abs(values[values != 0])))
        right.set_yticks(places, list(texts.values()), fontsize=8, parse_math=False)
        right.grid(axis="y", visible=False)
        right.invert_yaxis()
        right.set_title(
            f"the {hurting} most harmful rows, the {len(texts) - hurting} most helpful ones"
        )
        right.set_xlabel("score")
        for panel in (left, right):
            panel.axvline(0, color="black", linewidth=0.8)
            panel.xaxis.set_major_formatter("{x:.2g}")
        figure.supxlabel(note, fontsize=10)
    return figure


def row_groups(
    groups: Mapping[str, Mapping[str, float]], path: str | Path | None = None, label: str = ""
) -> Any:
    """Panels with a bar for each row, one below another.

    Args:
        groups: for each panel's title, the score of each row by its text.
        label: the label of the scores.

    Example:
        >>> figure = row_groups({"predicted yes": {"great film": 0.9, "fine": 0.2}}, label="score")
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [0.9, 0.2]
    """
    counts = [max(1, len(rows)) for rows in groups.values()] or [1]
    size = (11, 0.2 + sum(0.9 + 0.24 * count for count in counts))
    options: dict[str, Any] = {"height_ratios": counts, "squeeze": False}
    with drawing(path, *size, len(counts), **options) as (_, grid):
        for panel, (title, rows) in zip(grid.flat, groups.items(), strict=False):
            panel.barh(range(len(rows)), list(rows.values()), color=BLUE)
            panel.set_yticks(range(len(rows)), list(rows), fontsize=8, parse_math=False)
            panel.set_title(title, loc="left", fontsize=9, parse_math=False)
            panel.grid(axis="y", visible=False)
            panel.invert_yaxis()
            panel.xaxis.set_major_formatter("{x:.2g}")
            panel.tick_params(axis="x", labelsize=8)
        grid.flat[-1].set_xlabel(label, fontsize=9)
    return grid.flat[0].figure
