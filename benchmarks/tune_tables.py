"""The accounting of `tune.py`: the trial that a budget selects, regret, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate

from attribution_tables import Row, Runs
from measure import Target
from scipy.stats import ttest_1samp

#: Trainings; the paired comparison is at the second ones.
POINTS, BUDGETS = (4, 8, 10, 15, 20, 30), (10, 20, 30)
OURS, CONTROL = "hypergradients", "random directions"
TPE, RANDOM, ORACLE = "TPE", "random search", "oracle"
#: What is measured on the test rows, and the sign that makes a difference one for the worse.
MEASURES = {"loss": 1, "accuracy": -1}


def selected(trials: Sequence[Row], budget: float) -> Row:
    """The trial with the lowest held-out loss of those that ``budget`` trainings pay for."""
    spent = accumulate(trial["trainings"] for trial in trials)
    paid = [trial for trial, cost in zip(trials, spent) if cost <= budget]
    return min(paid, key=lambda trial: float(trial["held"]))


def results(rows: Sequence[Row], method: str, budget: float, measure: str) -> list[float]:
    """A measure of the test rows after ``budget`` trainings, one for each task and seed."""
    named = sorted((r for r in rows if r["method"] == method), key=lambda r: (r["task"], r["seed"]))
    return [float(selected(row["trials"], budget)[measure]) for row in named]


def worse(
    rows: Sequence[Row], one: tuple[str, float], other: tuple[str, float], measure: str
) -> list[float]:
    """By how much ``one``, a method after some trainings, is worse than ``other``, paired."""
    pairs = zip(results(rows, *one, measure), results(rows, *other, measure), strict=True)
    return [MEASURES[measure] * (a - b) for a, b in pairs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % t interval of the mean."""
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(low), float(high)


def shown(values: Sequence[float]) -> str:
    """The mean and its interval."""
    low, high = interval(values)
    return f"{statistics.fmean(values):+.3f} ({low:+.3f} to {high:+.3f})"


def methods(rows: Sequence[Row]) -> list[str]:
    """The names of all methods, in order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows of the tasks and seeds on which every method has come to some budget."""
    return [row for row in rows if "budget" in row]


def reached(rows: Sequence[Row], budgets: Sequence[int] = BUDGETS) -> list[int]:
    """The budgets that all tasks and seeds, at least two, have come to."""
    cells = {(row["task"], row["seed"]): row["budget"] for row in rows}
    return [b for b in budgets if len(cells) > 1 and b <= min(cells.values())]


def oracles(rows: Sequence[Row]) -> list[Row]:
    """A row for each task and seed, with all trials of TPE and of random search."""
    cells: dict[tuple[str, int], list[Row]] = {(row["task"], row["seed"]): [] for row in rows}
    for row in rows:
        if row["method"] in (TPE, RANDOM):
            cells[row["task"], row["seed"]] += row["trials"]
    return [
        {"method": ORACLE, "task": task, "seed": seed, "trials": trials}
        for (task, seed), trials in cells.items()
    ]


def regret_table(rows: Sequence[Row], measure: str) -> list[Row]:
    """The mean regret of each method: how much worse it is than what the oracle selects."""
    points, table = reached(rows, POINTS), []
    known = [*rows, *oracles(rows)]
    for method in methods(rows) if points else ():
        line: Row = {"method": method}
        for budget in points:
            values = worse(known, (method, budget), (ORACLE, math.inf), measure)
            ended = method == CONTROL and budget > BUDGETS[0]
            line[f"{budget} trainings"] = None if ended else round(statistics.fmean(values), 9)
        table.append(line)
    return table


def best_baseline(rows: Sequence[Row], budget: float) -> str:
    """The baseline with the lowest mean test loss after ``budget`` trainings, with hindsight."""
    baselines = [name for name in methods(rows) if name not in (OURS, CONTROL)]
    return min(baselines, key=lambda name: statistics.fmean(results(rows, name, budget, "loss")))


def paired_table(rows: Sequence[Row]) -> list[Row]:
    """By how much each other method is worse than the hypergradients at each budget."""
    table = []
    for budget in reached(rows):
        best = best_baseline(rows, budget)
        for name in methods(rows):
            if name != OURS and not (name == CONTROL and budget > BUDGETS[0]):
                line: Row = {"trainings": budget, "other": name}
                for measure in MEASURES:
                    values = worse(rows, (name, budget), (OURS, budget), measure)
                    line[f"other − hypergradients, {measure}"] = shown(values)
                line["runs"] = len(values)
                table.append({**line, "best baseline": "yes" if name == best else ""})
    return table


def path_table(rows: Sequence[Row]) -> list[Row]:
    """What an outer step of each of the two descents does to the held-out loss."""
    table = []
    for name in (OURS, CONTROL):
        steps = [t for r in rows if r["method"] == name for t in r["trials"] if "change" in t]
        line: Row = {"directions": name, "steps": len(steps)}
        line["fell in"] = statistics.fmean(t["change"] < 0 for t in steps)
        line["mean change"] = statistics.fmean(t["change"] for t in steps)
        predicted = [t["predicted"] for t in steps if "predicted" in t]
        line["predicted change"] = statistics.fmean(predicted) if predicted else None
        table.append(line)
    return table


def cost_table(rows: Sequence[Row]) -> list[Row]:
    """What one hypergradient costs beyond the training that it differentiates."""
    ours = [row for row in rows if row["method"] == OURS]
    ratios = [r["seconds"]["hypergradients"] / r["seconds"]["trainings"] for r in ours]
    paid = [t["trainings"] - 1 for r in ours for t in r["trials"] if t["trainings"] > 1]
    return [{"passes": statistics.fmean(paid), "processor time": statistics.median(ratios)}]


def development_table(rows: Sequence[Row]) -> list[Row]:
    """The mean test loss of each setting on the development seeds."""
    table = []
    for name in methods(rows):
        line: Row = {"setting": name}
        for budget in BUDGETS[:2]:
            values = results(rows, name, budget, "loss")
            line[f"{budget} trainings"] = statistics.fmean(values)
        table.append({**line, "runs": len(values)})
    return table


def tables_of(runs: Runs) -> dict[str, list[Row]]:
    """All tables that have rows."""
    rows = complete(runs.of("compare"))
    found = {
        "Settings (development seeds)": development_table(complete(runs.of("develop"))),
        "Regret of the test loss": regret_table(rows, "loss"),
        "Regret of the test accuracy": regret_table(rows, "accuracy"),
        "Paired differences": paired_table(rows),
    }
    if reached(rows):
        found["Outer steps"] = path_table(rows)
        found["A hypergradient, in trainings"] = cost_table(rows)
    return {title: table for title, table in found.items() if table}


def targets_of(runs: Runs) -> list[Target]:
    """Whether the interval against the best baseline is above zero."""
    rows, found = complete(runs.of("compare")), []
    for budget in reached(rows):
        name, values = against_the_best(rows, budget)
        title = f"{budget} trainings, test loss of the best baseline ({name}) − hypergradients"
        found.append(Target(f"{title}, lower end of 95 %", interval(values)[0], 0.0, True))
    return found


def against_the_best(rows: Sequence[Row], budget: float) -> tuple[str, list[float]]:
    """The best baseline at a budget, and by how much it is worse than the hypergradients."""
    name = best_baseline(rows, budget)
    return name, worse(rows, (name, budget), (OURS, budget), "loss")


def decision(runs: Runs) -> str:
    """The sentence on which the second stage hangs."""
    rows, said, won = complete(runs.of("compare")), [], False
    for budget in reached(rows):
        name, values = against_the_best(rows, budget)
        won = won or interval(values)[0] > 0
        said.append(f"{shown(values)} against {name} after {budget} trainings")
    verdict = "is above zero at some budget" if won else "is above zero at no budget"
    return f"The paired interval against the best baseline {verdict}: {'; '.join(said)}."
