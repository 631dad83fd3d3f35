"""Tables and targets from the entries of the attribution benchmarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.attribution.runs import TRAIN
from benchmarks.measure import Target
from benchmarks.store import Row, Store
from hyperopt_peft.attribution import ScoreCheck

TASKS = ("tweets", "movies")
#: The share of the rows that a retraining leaves out.
SHARE = 0.05
WHOLE = "unrolled"
#: The scores of a head on the features of the model before training.
HEAD = "head"
#: MAGIC (arXiv:2503.13751) by Bergson (arXiv:2606.11660), the same derivative.
MAGIC = "Bergson (MAGIC)"
#: The titles of the tables of `trainers.py`, by part.
TRAINERS = {
    "tags": "Token tags (a Trainer, smooth setting; costs with the training)",
    "documents": "Documents (a Trainer, smooth setting; costs with the training)",
}


def check(row: Row, name: str) -> ScoreCheck:
    """The check of the method ``name`` against an entry's retrainings."""
    predicted = torch.tensor(row["methods"][name]["predicted"], dtype=torch.float64)
    truth = torch.tensor(row["actual"], dtype=torch.float64)
    smooth = row.get("metasmoothness") if name == WHOLE else None
    return ScoreCheck(predicted[: len(truth)], truth, smooth, SHARE)


def lds(result: ScoreCheck) -> float:
    """The LDS, or 0 if all predictions are equal, for example after a solve that ended at 0."""
    return 0.0 if math.isnan(result.lds) else result.lds


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None if there are no values."""
    numbers = list(values)
    return statistics.fmean(numbers) if numbers else None


def smooth_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each change, means over the development seeds."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [r for r in rows if r["name"] == name and len(r.get("actual", ())) > 4]
        checks = [check(r, WHOLE) for r in named]
        if checks:
            table.append(
                {
                    "run": name,
                    "LDS": mean(map(lds, checks)),
                    "slope": mean(c.slope for c in checks),
                    "metasmoothness": mean(c.metasmoothness for c in checks if c.metasmoothness),
                    "loss": mean(r["loss"] for r in named),
                    "runs": len(checks),
                    "retrainings": sum(len(c.actual) for c in checks),
                }
            )
    return table


def damping_table(rows: Sequence[Row]) -> list[Row]:
    """The LDS of the solver with each damping, means over the development seeds."""
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [r for r in rows if r["name"] == name and len(r.get("methods", ())) > 1]
        for method in dict.fromkeys(m for r in named for m in r["methods"] if m != WHOLE):
            checks = [check(r, method) for r in named if method in r["methods"]]
            line = {"run": name, "method": method, "LDS": mean(map(lds, checks))}
            table.append({**line, "runs": len(checks)})
    return table


def methods_table(rows: Sequence[Row], setting: str, tasks: Sequence[str] = TASKS) -> list[Row]:
    """A row for each method: means over the seeds on each task, cost over all."""
    rows = [r for r in rows if r["setting"] == setting and len(r.get("actual", ())) > 4]
    table = []
    for name in dict.fromkeys(name for row in rows for name in row["methods"]):
        line: Row = {"method": name}
        for task in tasks:
            checks = [check(r, name) for r in rows if r["task"] == task and name in r["methods"]]
            line[f"{task}: LDS"] = mean(map(lds, checks))
            line[f"{task}: interval"] = interval(checks) if checks else None
            slopes = [c.slope for c in checks if not math.isnan(c.slope)]
            line[f"{task}: slope"] = mean(slopes)
        costs = [r["methods"][name] for r in rows if name in r["methods"]]
        line["trainings"] = mean(m["trainings"] for m in costs if "trainings" in m)
        line["time"] = statistics.median(
            r["methods"][name]["seconds"] / r["seconds of a retraining"]
            for r in rows
            if name in r["methods"]
        )
        line["seeds"] = len({r["seed"] for r in rows if name in r["methods"]})
        table.append(line)
    return table


def interval(checks: Sequence[ScoreCheck]) -> str:
    """The 95 % interval of the mean LDS of runs, each with the error of its retrainings."""
    intervals = [c.interval for c in checks if not math.isnan(c.lds)]
    half = sum(((high - low) / 2) ** 2 for low, high in intervals) ** 0.5 / len(checks)
    middle = sum(sum(pair) / 2 for pair in intervals) / len(checks)
    return f"{middle - half:.2f} to {min(middle + half, 1.0):.2f}"


def suspects_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each kind of noise: the areas, means over the seeds."""
    rows, table = [row for row in rows if "auc" in row], []
    for key in dict.fromkeys((r["task"], r["noise"], r["share"]) for r in rows):
        same = [r for r in rows if (r["task"], r["noise"], r["share"]) == key]
        wrong = statistics.fmean(r["wrong"] for r in same) / TRAIN
        names = dict.fromkeys(name for r in same for name in r["auc"])
        areas = {n: mean(r["auc"][n] for r in same if n in r["auc"]) for n in names}
        table.append(
            {"texts": key[0], "noise": key[1], "wrong": wrong, **areas, "seeds": len(same)}
        )
    return table


def cost_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each length of the run; costs in trainings, memory in adapter sizes."""
    return [
        {
            "run": row["setting"],
            "passes": mean(r["trainings"] for r in row["rounds"]),
            "time": statistics.median(r["whole"] / r["plain"] for r in row["rounds"]),
            "memory of one step": row.get("memory of one step"),
            "memory beyond it": row.get("memory"),
        }
        for row in rows
        if row.get("rounds")
    ]


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """All tables that have rows."""
    tables = {
        "Which change makes a run smooth (development seeds)": smooth_table(runs.of("smooth")),
        "Damping of the solvers (development seeds)": damping_table(runs.of("smooth")),
        "Rough setting": methods_table(runs.of("methods"), "rough"),
        "Smooth setting": methods_table(runs.of("methods"), "smooth"),
        **{t: methods_table(runs.of(p), "smooth", [p]) for p, t in TRAINERS.items()},
        "Cost of the whole run": cost_table(runs.of("cost")),
        "Peak memory of the scores, in adapter sizes": [
            {"method": name, "memory": size}
            for row in runs.of("memory")
            for name, size in row["adapters"].items()
        ],
        "Wrong labels: area under the curve": suspects_table(runs.of("suspects")),
    }
    return {title: rows for title, rows in tables.items() if rows}


def targets_of(tables: Mapping[str, Sequence[Row]]) -> list[Target]:
    """The targets, with the measured values."""
    targets = []
    settings = {"Rough setting": TASKS, "Smooth setting": TASKS}
    for title, tasks in (settings | {title: (part,) for part, title in TRAINERS.items()}).items():
        rows = {row["method"]: row for row in tables.get(title, ())}
        for task in tasks if WHOLE in rows else ():
            where = f"{title.lower()}, {task}" if title in settings else task
            whole_lds, slope = rows[WHOLE][f"{task}: LDS"], rows[WHOLE][f"{task}: slope"]
            if whole_lds is None:
                continue
            others = [r[f"{task}: LDS"] for name, r in rows.items() if name not in (WHOLE, MAGIC)]
            best = max(other for other in others if other is not None)
            if title == "Smooth setting":
                targets.append(Target(f"LDS of the whole run, {where}", whole_lds, 0.95, True))
                targets.append(
                    Target(f"|slope − 1| of the whole run, {where}", abs(slope - 1), 0.1)
                )
            name = f"LDS of the whole run − best other method, {where}"
            targets.append(Target(name, whole_lds - best, 0, True))
    for row in tables.get("Cost of the whole run", ()):
        targets.append(Target(f"attribution ÷ training, passes, {row['run']}", row["passes"], 4))
        targets.append(Target(f"attribution ÷ training, time, {row['run']}", row["time"], 4.5))
        if row["memory beyond it"] is not None:
            name = f"memory beyond that of one step ÷ adapter, {row['run']}"
            targets.append(Target(name, row["memory beyond it"], 80))
    key = "Wrong labels: area under the curve"
    rows_of = [row for row in tables.get(key, ()) if "cleanlab, self-confidence" in row]
    if rows_of:
        least = min(r["library (`suspects`)"] - r["cleanlab, self-confidence"] for r in rows_of)
        targets.append(Target("suspects − cleanlab, area under the curve", least, 0, True))
    return targets
