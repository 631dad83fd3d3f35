"""The tables of `cells`, made of the entries of its file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from benchmarks.measure import mean_and_half
from benchmarks.store import Row, Store

LEARNT, SEARCH = "learnt", "search (TPE)"
BASELINES = (
    "trusted only",
    "all, equal weights",
    "all, then trusted",
    "agreement",
    "filtered",
    SEARCH,
)
#: Of each method, the entries by seed.
Cell = dict[str, dict[int, Row]]


def cells(runs: Store) -> Iterator[tuple[tuple[str, str, int], Cell]]:
    """Task, model and trusted rows, and the measured entries."""
    rows = [row for row in runs.of("cells") if "accuracy" in row]
    for key in dict.fromkeys((r["task"], r["model"], r["trusted"]) for r in rows):
        cell: Cell = {}
        for row in rows:
            if (row["task"], row["model"], row["trusted"]) == key:
                cell.setdefault(row["method"], {})[row["seed"]] = row
        yield key, cell


def accuracy(by_seed: dict[int, Row]) -> float:
    """The mean over the seeds."""
    return statistics.fmean(row["accuracy"] for row in by_seed.values())


def paired(one: dict[int, Row], other: dict[int, Row]) -> tuple[float, float]:
    """The mean difference of accuracy over the common seeds, and half its 95 % interval.

    By Student's t; infinite of one seed.
    """
    seeds = one.keys() & other.keys()
    gaps = [one[seed]["accuracy"] - other[seed]["accuracy"] for seed in seeds]
    return mean_and_half(gaps)


def best_baseline(cell: Cell) -> str:
    """The baseline of the highest mean accuracy."""
    return max((name for name in BASELINES if name in cell), key=lambda name: accuracy(cell[name]))


def named_is_good(cell: Cell) -> list[bool]:
    """Whether the lowest cross-validated trusted loss names a good method, for each seed.

    Its accuracy is the highest one, or within one standard error of the difference of two
    accuracies that are the highest.
    """
    good = []
    for seed in sorted({seed for by_seed in cell.values() for seed in by_seed}):
        rows = {n: s[seed] for n, s in cell.items() if seed in s and "cv" in s[seed]}
        if LEARNT not in rows or len(rows) < 2:
            continue
        named = min(rows.values(), key=lambda row: statistics.fmean(row["cv"]))
        best = max(rows.values(), key=lambda row: row["accuracy"])
        top = best["accuracy"]
        error = math.sqrt(2 * top * (1 - top) / best["tests"])
        good.append(bool(top - named["accuracy"] <= error))
    return good


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """A row for each cell, and a row for each cell with the accuracy of each method."""
    summary, methods = [], []
    for (task, model, trusted), cell in cells(runs):
        row: Row = {"task": f"{task}, {model}, {trusted}"}
        methods.append(row | {n: f"{accuracy(cell[n]):.3f}" if n in cell else None for n in ALL})
        if LEARNT not in cell or not set(cell) & set(BASELINES):
            continue
        learnt, best = cell[LEARNT], best_baseline(cell)
        middle, half = paired(learnt, cell[best])
        row |= {"learnt": f"{accuracy(learnt):.3f}", "best other way": best}
        row["difference"] = f"{middle:+.3f} ± {half:.3f}"
        areas = [entry["auc"] for entry in learnt.values() if "auc" in entry]
        row["AUC"] = f"{statistics.fmean(areas):.2f}" if areas else None
        equal = cell.get("all, equal weights", {})
        passes = [learnt[s]["passes"] / equal[s]["passes"] for s in learnt if s in equal]
        row["trainings"] = f"{statistics.fmean(passes):.1f}" if passes else None
        good = named_is_good(cell)
        summary.append(row | {"named well": f"{sum(good)} of {len(good)}"})
    tables = {"The learned mix and the best other way": summary, "Accuracy": methods}
    return {title: rows for title, rows in tables.items() if rows}


#: The methods in the order of a table.
ALL = (*BASELINES, LEARNT, "learnt, no prior", "upper rate 0")
