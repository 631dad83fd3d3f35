"""Every figure of the library, in one style: colours distinct without colour vision, a light grid.

The colours are those of Okabe & Ito 2008 (https://jfly.uni-koeln.de/color/) that are dark enough
for lines on white. A function that draws returns the matplotlib figure, and writes it to ``path``,
whose suffix gives the format, unless that is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hyperopt_peft.errors import ProblemError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
BLUE, RED, GREY = COLOURS[0], COLOURS[3], "#999999"
#: The styles of the first six lines, of the next six, and so on.
STYLES = ("-", "--", ":")
#: The entries of a history that `level_curves` draws.
LOSSES = {"lower_loss": "lower level", "loss": "lower level"}
LOSSES |= {"upper_loss": "upper level", "eval_loss": "evaluation"}
#: Values of a line by its name: x and y.
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@contextmanager
def drawing(
    path: str | Path | None,
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    **subplots: Any,
) -> Iterator[tuple[Any, Any]]:
    """A new figure and its axes in this style, saved to ``path`` when the block ends.

    matplotlib is imported here, without pyplot: no global figure, no display.

    Args:
        path: the file to write; None writes none.
        width, height: of the figure, in inches.
        rows, columns: of axes.
        subplots: other arguments of ``Figure.subplots``, such as ``sharex`` and ``width_ratios``.

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
        yield figure, figure.subplots(rows, columns, **subplots)
        if path is not None:
            try:
                figure.savefig(path)
            except (OSError, ValueError) as error:  # ValueError: an unknown format
                reason = getattr(error, "strerror", None) or error
                raise ProblemError(f"{path}: cannot be written ({reason})") from error


def lines(panels: Mapping[str, Lines], path: str | Path | None = None, **axes: Any) -> Any:
    """A panel for each title in ``panels``, one below another, with the same legend beside them.

    Args:
        panels: by title, the lines by name, 18 names at most.
        axes: properties of all axes, such as ``xlabel``, ``ylabel`` and ``yscale``.
    """
    names = list(dict.fromkeys(name for named in panels.values() for name in named))
    shown = {}
    height = min(4 * len(panels), 12)
    with drawing(path, 7.5, height, rows=len(panels), squeeze=False) as (figure, grid):
        for panel, (title, named) in zip(grid.flat, panels.items(), strict=True):
            for name, (x, y) in named.items():
                group, colour = divmod(names.index(name), len(COLOURS))
                style: dict[str, Any] = {"color": COLOURS[colour], "linestyle": STYLES[group]}
                style |= {"marker": "o", "markersize": 4} if len(x) <= 12 else {}
                (shown[name],) = panel.plot(x, y, **style)
            panel.set(title=title, **axes)
            if panel.get_xscale() == "linear":
                panel.locator_params(axis="x", integer=True, nbins=8)
        lines = [shown[name] for name in names]
        legend = figure.legend(lines, names, loc="outside right upper")
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a name is a $
    return figure


def smooth(x: Sequence[float], y: Sequence[float], share: float = 0.1) -> tuple[Any, Any]:
    """The means of ``y`` over windows of a ``share`` of it, and x at their ends."""
    width = max(1, round(share * len(y)))
    return np.asarray(x[width - 1 :]), np.convolve(y, np.ones(width) / width, mode="valid")


def level_curves(history: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> Any:
    """The losses of both levels over a run, each smoothed over a twentieth of it.

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
        with_key = [(k + 1, record) for k, record in enumerate(records) if key in record]
        if with_key:
            x = [record.get("step", number) for number, record in with_key]
            curves[name] = smooth(x, [record[key] for _, record in with_key], 0.05)
    step = "upper step" if any("lower_loss" in record for record in records) else "lower step"
    return lines({"": curves}, path, xlabel=step, ylabel="loss")


def intervals(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    path: str | Path | None = None,
    zero: Sequence[str] = (),
) -> Any:
    """A value with an interval for each name, the names below each other, a panel a measure.

    Args:
        panels: by measure, (value, lower end, upper end) by name; all have the same names.
        zero: the measures with a line at 0, such as paired differences.
    """
    names = list(next(iter(panels.values())))
    size = (3.5 + 3.5 * len(panels), 1 + 0.35 * len(names))
    with drawing(path, *size, columns=len(panels), sharey=True, squeeze=False) as (figure, grid):
        for panel, colour, (measure, rows) in zip(grid.flat, COLOURS, panels.items()):
            if measure in zero:
                panel.axvline(0, color="black", linewidth=0.8)
            for y, (value, low, high) in enumerate(rows[name] for name in names):
                panel.plot((low, high), (y, y), color=colour, alpha=0.4, linewidth=5)
                panel.plot(value, y, "o", color=colour)
            panel.set_xlabel(measure)
        grid.flat[0].set_yticks(range(len(names)), names, parse_math=False)
        grid.flat[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def row_scores(
    scores: np.ndarray[Any, Any],
    texts: Mapping[int, str],
    note: str,
    path: str | Path | None = None,
) -> Any:
    """The distribution of the scores of training rows, and the rows that hurt and help most.

    Heavy tails are cut to thrice the size that nine tenths of the scores do not exceed: the
    outermost bars hold the rows beyond. The scores of the rows have a logarithmic axis beyond
    their median size.

    Args:
        scores: of each row, ``(n,)``; NaN for one that was never seen.
        texts: of the rows to draw, from the one that hurts most to the one that helps most.
        note: a line below, on how far the scores can be trusted.
    """
    seen, values = scores[~np.isnan(scores)], np.array([scores[row] for row in texts])
    height = 2.5 + 0.24 * max(len(texts), 6)
    with drawing(path, 11, height, columns=2, width_ratios=(1, 1.6)) as (figure, (left, right)):
        end = 3 * np.quantile(np.abs(seen), 0.9) or 1.0
        left.hist(seen.clip(-end, end), bins=min(40, 6 + len(seen) // 5), color=GREY)
        beyond = int((np.abs(seen) > end).sum())
        cut = f"\noutermost bars: {beyond} rows beyond" if beyond else ""
        left.set_xlabel(f"score dΦ/dv: helps < 0 < hurts{cut}")
        left.set_ylabel("training rows")
        left.set_title(f"{len(seen)} rows, {100 * (seen > 0).mean():.0f} % of them hurt")
        left.locator_params(axis="x", nbins=4)
        places, hurting = range(len(texts)), int((values > 0).sum())
        right.barh(places, values, color=[RED if value > 0 else BLUE for value in values])
        if values.any():
            right.set_xscale("symlog", linthresh=np.median(np.abs(values[values != 0])))
        right.set_yticks(places, list(texts.values()), fontsize=8, parse_math=False)
        right.grid(axis="y", visible=False)
        right.invert_yaxis()
        right.set_title(
            f"the {hurting} rows that hurt most, the {len(texts) - hurting} that help most"
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
    """Bars of rows in panels, one below another.

    Args:
        groups: by the title of a panel, the score of each row by its text.
        label: of the scores.
    """
    counts = [max(1, len(rows)) for rows in groups.values()] or [1]
    size = (11, 0.2 + sum(0.9 + 0.24 * count for count in counts))
    options: dict[str, Any] = {"height_ratios": counts, "squeeze": False}
    with drawing(path, *size, rows=len(counts), **options) as (_, grid):
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
