"""The tables that a report or a paper prints: DataFrames of texts, made of those of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas  # type: ignore[import-untyped]

from hyperopt_peft.comparison.choice import AXES
from hyperopt_peft.utils.verdict import Verdict

if TYPE_CHECKING:
    from hyperopt_peft.comparison.result import Comparison

#: Columns of the scores that are not in a paper's.
NOT_PRINTED = ["rate", "upper rate", "seconds"]


def scores(found: Comparison) -> Any:
    """The score of each method and ablation, its difference to the first one, and its price."""
    rows = []
    first, score = found.plan.candidates()[0], found.score_name
    numbers = found.table()
    for candidate in found.plan.candidates():
        title = found.title(*candidate)
        gap = found.verdicts.get((candidate, first))
        row = {"method": title, score: found.mean(candidate).shown()}
        row[f"− {found.first}"] = "" if gap is None else marked(gap)
        if len(found.plan.endings) > 1:
            row["stopped"] = found.mean(candidate, stopped=True).shown()
            row["stopped at"] = f"{numbers.stopped_passes[title]:.0f}"
        if found.plan.passes:
            for axis in AXES:
                row[axis.replace("_", " ")] = digits(numbers[axis][title])
            row["passes"] = f"{numbers.passes[title]:.1f}"
        rows.append({**row, "seconds": f"{numbers.seconds[title]:.1f}"})
    return pandas.DataFrame(rows)


def every(found: Comparison) -> dict[str, Any]:
    """All tables by heading."""
    rates = found.rates().set_index("method")
    rates["mean"] = [found.shown(mean) for mean in rates["mean"]]
    all_of = {
        "Scores": scores(found),
        "Numbers": plain(found.table()),
        "Differences": plain(found.differences()),
        "Held-out score at every rate": plain(rates.rename(columns={"mean": found.score_name})),
    }
    return {title: table for title, table in all_of.items() if len(table)}


def plain(numbers: Any) -> Any:
    """``numbers`` with four digits, nothing for NaN, and words for names; the index is a column."""
    return numbers.reset_index().map(digits).rename(columns=lambda x: x.replace("_", " "))


def digits(value: Any) -> str:
    """``value`` with four digits, if it is a number; nothing for NaN."""
    if value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows_of(table: Any) -> list[list[str]]:
    """The heads and the cells of a table, by row."""
    return [[*table.columns], *table.to_numpy().tolist()]


def marked(verdict: Verdict) -> str:
    """A difference, with an asterisk if it is significant."""
    return f"{verdict}*" if verdict.is_significant else str(verdict)
