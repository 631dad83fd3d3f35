"""A picture of the scores: their distribution, and the rows at both ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperopt_peft.utils.plots import BLUE, GREY, RED, drawing


def picture(
    scores: Tensor, lines: Mapping[int, str], trust: str, path: str | Path | None = None
) -> Any:
    """The figure of `Attribution.plot`.

    Args:
        scores: ``(n,)``; NaN for a row that was never seen.
        lines: the text of each row that is drawn, from the one that hurts most to the one that
            helps most.
        trust: what is known of the scores, below the picture.
        path: the file to write; None writes none.
    """
    seen, values = scores[~scores.isnan()], [float(scores[row]) for row in lines]
    hurting = sum(value > 0 for value in values)
    height = 2.5 + 0.24 * max(len(lines), 6)
    with drawing(path, 11, height, columns=2, width_ratios=(1, 1.6)) as (figure, (left, right)):
        left.hist(seen.numpy(), bins=min(40, max(5, len(seen) // 5)), color=GREY)
        left.axvline(0, color="black", linewidth=0.8)
        left.set_xlabel("score dΦ/dv: helps < 0 < hurts")
        left.set_ylabel("training rows")
        left.set_title(f"{len(seen)} rows, {float((seen > 0).double().mean()):.0%} of them hurt")
        y_positions = range(len(lines))
        right.barh(y_positions, values, color=[RED if value > 0 else BLUE for value in values])
        right.set_yticks(y_positions, list(lines.values()), fontsize=8, parse_math=False)
        right.grid(axis="y", visible=False)
        right.invert_yaxis()
        right.axvline(0, color="black", linewidth=0.8)
        right.set_title(
            f"the {hurting} rows that hurt most, the {len(lines) - hurting} that help most"
        )
        right.set_xlabel("score")
        right.locator_params(axis="x", nbins=6)
        figure.supxlabel(trust.partition(":")[0], fontsize=9)
    return figure
