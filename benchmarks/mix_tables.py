"""The tables and targets of `mix.py`, made of the entries of its JSON file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attribution_tables import Runs, mean
from measure import Target, mean_and_half

from hyperopt_peft.problems.compare_baselines import BaselineComparison, MethodResult

Row = dict[str, Any]
LEARNT, SEARCH = "learnt", "search (TPE)"
BASELINES = (
    "trusted only",
    "all, equal weights",
    "all, then trusted",
    "agreement",
    "filtered",
    SEARCH,
)
#: Up to how many trusted rows the learnt mix is to be better.
FEW = 64
Cell = dict[str, dict[int, Row]]


def cells(runs: Runs) -> Iterator[tuple[tuple[str, str, int], Cell]]:
    """Task, model and trusted rows, and of each method the entries by seed."""
    rows = [row for row in runs.of("cells") if "accuracy" in row]
    for key in dict.fromkeys((r["task"], r["model"], r["trusted"]) for r in rows):
        cell: Cell = {}
        for row in rows:
            if (row["task"], row["model"], row["trusted"]) == key:
                cell.setdefault(row["method"], {})[row["seed"]] = row
        yield key, cell


def paired(one: dict[int, Row], other: dict[int, Row]) -> tuple[float, float]:
    """The mean difference of accuracy over the common seeds, and half its 95 % interval.

    By Student's t; infinite of one seed.
    """
    seeds = one.keys() & other.keys()
    gaps = [one[seed]["accuracy"] - other[seed]["accuracy"] for seed in seeds]
    return mean_and_half(gaps)


def best_baseline(cell: Cell) -> str:
    """The baseline of the highest mean accuracy."""
    return max(
        (name for name in BASELINES if name in cell),
        key=lambda name: statistics.fmean(row["accuracy"] for row in cell[name].values()),
    )


def cell_table(cell: Cell) -> list[Row]:
    """A row for each method."""
    found, learnt = [], cell.get(LEARNT, {})
    for name, by_seed in cell.items():
        rows = list(by_seed.values())
        accuracy = [row["accuracy"] for row in rows]
        line: Row = {"method": name, "accuracy": statistics.fmean(accuracy)}
        several = len(accuracy) > 1
        line["±"] = statistics.stdev(accuracy) / math.sqrt(len(accuracy)) if several else None
        line["loss"] = statistics.fmean(row["loss"] for row in rows)
        line["trusted loss"] = mean(statistics.fmean(row["cv"]) for row in rows if "cv" in row)
        gap = None
        if name != LEARNT and learnt.keys() & by_seed.keys():
            middle, half = paired(learnt, by_seed)
            gap = f"{middle:+.3f} ± {half:.3f}"
        line["learnt − this"] = gap
        line["AUC"] = mean(row["auc"] for row in rows if "auc" in row)
        unit = cell.get("all, equal weights", {})
        line["trainings"] = mean(
            row["passes"] / unit[seed]["passes"] for seed, row in by_seed.items() if seed in unit
        )
        line["seeds"] = len(rows)
        found.append(line)
    return found


def verdicts(runs: Runs) -> list[Row]:
    """For each cell and seed, the method that a rule names, and whether it is good enough.

    It is where its accuracy is the highest one, or within one standard error of the difference of
    two accuracies that are the highest. ``lowest`` names the lowest cross-validated trusted loss,
    as a `BaselineComparison` does, ``cheapest`` the cheapest way within a standard error of it.
    """
    found = []
    for (task, model, trusted), cell in cells(runs):
        for seed in sorted({seed for by_seed in cell.values() for seed in by_seed}):
            rows = {n: s[seed] for n, s in cell.items() if seed in s and "cv" in s[seed]}
            if LEARNT not in rows or len(rows) < 2:
                continue
            best = max(rows, key=lambda name: rows[name]["accuracy"])
            top = rows[best]["accuracy"]
            error = math.sqrt(2 * top * (1 - top) / rows[best]["tests"])
            entries = [
                MethodResult(name, torch.tensor(row["cv"]), round(row["passes"]))
                for name, row in rows.items()
            ]
            verdict = BaselineComparison(entries)
            line: Row = {"task": task, "model": model, "trusted": trusted, "seed": seed}
            line["best"] = best
            for rule, chosen in (("lowest", verdict.best), ("cheapest", verdict.cheapest)):
                line[rule] = chosen.method
                behind = top - rows[chosen.method]["accuracy"]
                line[f"{rule}: behind"] = behind
                line[f"{rule}: good"] = bool(behind <= error)
            found.append(line)
    return found


def development_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each change of the recipe: mean accuracy of each task."""
    found: dict[str, Row] = {}
    rows = [row for row in rows if "accuracy" in row]
    tasks = dict.fromkeys((r["task"], r["model"], r["trusted"]) for r in rows)
    for change in dict.fromkeys(row["change"] for row in rows):
        line = found.setdefault(change, {"change": change})
        for key in tasks:
            same = [
                r
                for r in rows
                if r["change"] == change and (r["task"], r["model"], r["trusted"]) == key
            ]
            line["{} {} {}".format(*key)] = mean(r["accuracy"] for r in same)
    return list(found.values())


def tables_of(runs: Runs) -> dict[str, list[Row]]:
    """All tables that have rows."""
    found = {"{}, {}, {} trusted rows".format(*key): cell_table(c) for key, c in cells(runs)}
    summary = []
    named = verdicts(runs)
    for key in dict.fromkeys((r["task"], r["model"], r["trusted"]) for r in named):
        same = [r for r in named if (r["task"], r["model"], r["trusted"]) == key]
        line: Row = {"cell": "{} {} {}".format(*key)}
        for rule in ("lowest", "cheapest"):
            line[f"{rule}: good"] = mean(float(r[f"{rule}: good"]) for r in same)
            line[f"{rule}: behind"] = mean(r[f"{rule}: behind"] for r in same)
            names = [r[rule] for r in same]
            line[f"{rule}: names"] = ", ".join(
                f"{name} ×{names.count(name)}" for name in dict.fromkeys(names)
            )
        summary.append({**line, "seeds": len(same)})
    found["Verdicts: share within a standard error of the best, and accuracy behind it"] = summary
    key = "Settings of the learnt mix, one changed (development seeds)"
    found[key] = development_table(runs.of("development"))
    return {title: rows for title, rows in found.items() if rows}


def targets_of(runs: Runs) -> list[Target]:
    """The targets of what has been measured."""
    found = []
    for (task, model, trusted), cell in cells(runs):
        if LEARNT not in cell or trusted > FEW or not set(cell) & set(BASELINES):
            continue
        where = f"{task}, {model}, {trusted} trusted rows"
        best = best_baseline(cell)
        middle, half = paired(cell[LEARNT], cell[best])
        if math.isfinite(half):
            name = f"learnt − best baseline ({best}), lower end of the interval, {where}"
            found.append(Target(name, middle - half, 0, True))
        areas = [row["auc"] for row in cell[LEARNT].values() if "auc" in row]
        if task != "trec" and areas:
            found.append(Target(f"good from bad sources, AUC, {where}", mean(areas), 0.9, True))
    named = verdicts(runs)
    for rule in ("lowest", "cheapest") if named else ():
        share = statistics.fmean(float(r[f"{rule}: good"]) for r in named)
        found.append(Target(f"verdicts within a standard error, {rule} loss", share, 0.9, True))
    return found
