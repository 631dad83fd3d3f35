"""Tables from the entries of the attribution benchmarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import torch

from benchmarks.attribution.runs import TRAIN
from benchmarks.store import Row, Store
from hyperopt_peft.attribution import ScoreCheck

TASKS = ("tweets", "movies")
#: The share of the rows that a retraining leaves out.
SHARE = 0.05
WHOLE = "unrolled"
#: The title of the table of `trainers.py`.
TAGS = "Token tags (a Trainer, smooth setting; costs with the training)"


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
    """A row for each length of the run; costs in trainings."""
    return [
        {
            "run": row["setting"],
            "passes": mean(r["trainings"] for r in row["rounds"]),
            "time": statistics.median(r["whole"] / r["plain"] for r in row["rounds"]),
        }
        for row in rows
        if row.get("rounds")
    ]


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """All tables that have rows."""
    tables = {
        "Rough setting": methods_table(runs.of("methods"), "rough"),
        "Smooth setting": methods_table(runs.of("methods"), "smooth"),
        TAGS: methods_table(runs.of("tags"), "smooth", ["tags"]),
        "Cost of the whole run": cost_table(runs.of("cost")),
        "Wrong labels: area under the curve": suspects_table(runs.of("suspects")),
    }
    return {title: rows for title, rows in tables.items() if rows}
