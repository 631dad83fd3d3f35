"""A picture of the scores: their distribution, and the rows at both ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperopt_peft.errors import ProblemError

if TYPE_CHECKING:
    from hyperopt_peft.attribution.result import Attribution

HURT, HELP = "tab:red", "tab:blue"


def picture(result: Attribution, path: str | Path | None = None, count: int = 10) -> Any:
    """The distribution of the scores, and the ``count`` rows at each end.

    Args:
        result: the scores.
        path: the file to write; None writes none.
        count: how many rows at each end.

    Returns:
        The matplotlib figure.

    Raises:
        ProblemError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    seen = result.scores[~result.scores.isnan()]
    hurt, help_ = result.ends(count)
    rows = [*hurt, *reversed(help_)]
    figure = Figure(figsize=(11, 2.5 + 0.24 * max(len(rows), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    left.hist(seen.numpy(), bins=min(40, max(5, len(seen) // 5)), color="0.6")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("score dΦ/dv: helps < 0 < hurts")
    left.set_ylabel("training rows")
    left.set_title(f"{len(seen)} rows, {float((seen > 0).double().mean()):.0%} of them hurt")
    places = list(range(len(rows)))
    values = [float(result.scores[row]) for row in rows]
    right.barh(places, values, color=[HURT if value > 0 else HELP for value in values])
    right.set_yticks(
        places, [result.line(row, width=44) for row in rows], fontsize=8, parse_math=False
    )
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set_title(f"the {len(hurt)} rows that hurt most, the {len(help_)} that help most")
    right.set_xlabel("score")
    right.locator_params(axis="x", nbins=6)
    if path is not None:
        try:
            figure.savefig(path, dpi=120)
        except (OSError, ValueError) as error:  # ValueError: an unknown format
            reason = getattr(error, "strerror", None) or error
            raise ProblemError(f"{path}: cannot be written ({reason})") from error
    return figure
