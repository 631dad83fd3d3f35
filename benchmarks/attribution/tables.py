"""The entries of the attribution benchmarks' JSON files, with the tables and targets of them."""

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
#: MAGIC (arXiv:2503.13751) by Bergson (arXiv:2606.11660), the same derivative.
MAGIC = "Bergson (MAGIC)"
#: The parts of `trainers.py`, with the titles of their tables.
TRAINERS = {
    "tags": "Token tags (a Trainer, smooth setting; costs with the training)",
    "documents": "Documents (a Trainer, smooth setting; costs with the training)",
}


def check(row: Row, name: str) -> ScoreCheck:
    """What an entry's retrainings say of the method ``name``."""
    found = torch.tensor(row["methods"][name]["predicted"], dtype=torch.float64)
    truth = torch.tensor(row["actual"], dtype=torch.float64)
    smooth = row.get("metasmoothness") if name == WHOLE else None
    return ScoreCheck(found[: len(truth)], truth, smooth, SHARE)


def lds(found: ScoreCheck) -> float:
    """The LDS; 0 where all predictions are equal, as of a solve that ended at 0."""
    return 0.0 if math.isnan(found.lds) else found.lds


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    known = list(values)
    return statistics.fmean(known) if known else None


def smooth_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each change, means over the development seeds."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [r for r in rows if r["name"] == name and len(r.get("actual", ())) > 4]
        checks = [check(r, WHOLE) for r in named]
        if checks:
            found.append(
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
    return found


def damping_table(rows: Sequence[Row]) -> list[Row]:
    """The LDS of the solver with each damping, means over the development seeds."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        named = [r for r in rows if r["name"] == name and len(r.get("methods", ())) > 1]
        for method in dict.fromkeys(m for r in named for m in r["methods"] if m != WHOLE):
            checks = [check(r, method) for r in named if method in r["methods"]]
            line = {"run": name, "method": method, "LDS": mean(map(lds, checks))}
            found.append({**line, "runs": len(checks)})
    return found


def methods_table(rows: Sequence[Row], setting: str, tasks: Sequence[str] = TASKS) -> list[Row]:
    """A row for each method: means over the seeds on each task, cost over all."""
    rows = [r for r in rows if r["setting"] == setting and len(r.get("actual", ())) > 4]
    found = []
    for name in dict.fromkeys(name for row in rows for name in row["methods"]):
        line: Row = {"method": name}
        for task in tasks:
            checks = [check(r, name) for r in rows if r["task"] == task and name in r["methods"]]
            line[f"{task}: LDS"] = mean(map(lds, checks))
            line[f"{task}: interval"] = interval(checks) if checks else None
            slopes = [c.slope for c in checks if not math.isnan(c.slope)]
            line[f"{task}: slope"] = mean(slopes)
        known = [r["methods"][name] for r in rows if name in r["methods"]]
        line["trainings"] = mean(m["trainings"] for m in known if "trainings" in m)
        line["time"] = statistics.median(
            r["methods"][name]["seconds"] / r["seconds of a retraining"]
            for r in rows
            if name in r["methods"]
        )
        line["seeds"] = len({r["seed"] for r in rows if name in r["methods"]})
        found.append(line)
    return found


def interval(checks: Sequence[ScoreCheck]) -> str:
    """The 95 % interval of the mean LDS of runs, each with the error of its retrainings."""
    known = [c.interval for c in checks if not math.isnan(c.lds)]
    half = sum(((high - low) / 2) ** 2 for low, high in known) ** 0.5 / len(checks)
    middle = sum(sum(pair) / 2 for pair in known) / len(checks)
    return f"{middle - half:.2f} to {min(middle + half, 1.0):.2f}"


def suspects_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each kind of noise: the areas, means over the seeds."""
    rows, found = [row for row in rows if "auc" in row], []
    for key in dict.fromkeys((r["task"], r["noise"], r["share"]) for r in rows):
        same = [r for r in rows if (r["task"], r["noise"], r["share"]) == key]
        wrong = statistics.fmean(r["wrong"] for r in same) / TRAIN
        names = dict.fromkeys(name for r in same for name in r["auc"])
        areas = {n: mean(r["auc"][n] for r in same if n in r["auc"]) for n in names}
        found.append(
            {"texts": key[0], "noise": key[1], "wrong": wrong, **areas, "seeds": len(same)}
        )
    return found


def cost_table(rows: Sequence[Row]) -> list[Row]:
    """A row for each length of the run; everything in trainings, memory in adapter sizes."""
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
    found = {
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
    return {title: rows for title, rows in found.items() if rows}


def targets_of(tables: Mapping[str, Sequence[Row]]) -> list[Target]:
    """The targets of what has been measured."""
    found = []
    settings = {"Rough setting": TASKS, "Smooth setting": TASKS}
    for title, tasks in (settings | {title: (part,) for part, title in TRAINERS.items()}).items():
        rows = {row["method"]: row for row in tables.get(title, ())}
        for task in tasks if WHOLE in rows else ():
            where = f"{title.lower()}, {task}" if title in settings else task
            found_lds, slope = rows[WHOLE][f"{task}: LDS"], rows[WHOLE][f"{task}: slope"]
            if found_lds is None:
                continue
            others = [r[f"{task}: LDS"] for name, r in rows.items() if name not in (WHOLE, MAGIC)]
            best = max(other for other in others if other is not None)
            if title == "Smooth setting":
                found.append(Target(f"LDS of the whole run, {where}", found_lds, 0.95, True))
                found.append(Target(f"|slope − 1| of the whole run, {where}", abs(slope - 1), 0.1))
            name = f"LDS of the whole run − best other method, {where}"
            found.append(Target(name, found_lds - best, 0, True))
    for row in tables.get("Cost of the whole run", ()):
        found.append(Target(f"attribution ÷ training, passes, {row['run']}", row["passes"], 4))
        found.append(Target(f"attribution ÷ training, time, {row['run']}", row["time"], 4.5))
        if row["memory beyond it"] is not None:
            name = f"memory beyond that of one step ÷ adapter, {row['run']}"
            found.append(Target(name, row["memory beyond it"], 80))
    key = "Wrong labels: area under the curve"
    rows_of = [row for row in tables.get(key, ()) if "cleanlab, self-confidence" in row]
    if rows_of:
        least = min(r["library (`suspects`)"] - r["cleanlab, self-confidence"] for r in rows_of)
        found.append(Target("suspects − cleanlab, area under the curve", least, 0, True))
    return found
