"""The style of every figure: colours that remain distinct without colour vision, a light grid.

The colours are those of Okabe & Ito 2008 (https://jfly.uni-koeln.de/color/) that are dark enough
for lines on white.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyperopt_peft.errors import ProblemError

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
GREY = "#999999"


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
        path: the file to write, whose suffix gives the format; None writes none.
        width, height: of the figure, in inches.
        rows, columns: of axes; more than one give an array of axes.
        subplots: other arguments of ``Figure.subplots``, such as ``sharex`` and ``width_ratios``.

    Raises:
        ProblemError: the file cannot be written, or its suffix names no format.

    Example:
        >>> with drawing("line.png", 4, 3) as (figure, axes):
        ...     lines = axes.plot([0, 1], [0, 1], color=COLOURS[0], label="a line")
        ...     legend = axes.legend()
        >>> Path("line.png").exists()
        True
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
