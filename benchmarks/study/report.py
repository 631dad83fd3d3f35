"""Tables, statistics and figures of a study, from its result files alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import linregress, wilcoxon
from scipy.stats import t as student

from benchmarks import pages
from benchmarks.measure import mean_and_half, table
from benchmarks.store import Store
from benchmarks.study.plan import Run, Study

PAGE, FIGURE = pages.DOCS / "results.md", pages.DOCS / "results.png"
#: DoRA of as many steps, and of as many passes as BiDoRA.
DORA, LONGER = "DoRA", "DoRA, three times the steps"
BIDORA = "BiDoRA"
#: Of a difference of scores; what is zero then is a tie.
DIGITS = 9
Result = dict[str, Any]
Row = dict[str, Any]
#: Of a method, the results by task and seed.
Methods = dict[str, dict[tuple[str, int], Result]]


def report(study: Study, store: Store, *, check: bool) -> None:
    """Write the tables between the marks of docs/results.md, and its figure.

    Raises:
        SystemExit: with ``check``, where the page would change; nothing is written then. A mark of
            the page has no table.
    """
    named = {f"study {name}": text for name, text in sections(study, store).items()}
    marks = re.findall(r"<!-- (study [\w ]+) table -->", PAGE.read_text())
    if missing := [mark for mark in marks if mark not in named]:
        raise SystemExit(f"{PAGE.name} has marks of tables without results: {', '.join(missing)}")
    pages.write(PAGE, named, check=check)
    if not check:
        figure(study, store)


def sections(study: Study, store: Store) -> dict[str, str]:
    """The tables that have rows, as Markdown, by the names of their marks."""
    tables = {"variants": variants(study, store), "shift": shift_table(study, store)}
    for size in study.sizes:
        methods = of_size(study, store, size)
        tables |= {
            f"scores {size}": scores(study, methods),
            f"pairs {size}": pairs(methods),
            f"held out {size}": held_out(study, store, size),
            f"slopes {size}": slopes(methods),
        }
    return {name: table(rows) for name, rows in tables.items() if rows}


def of_size(study: Study, store: Store, size: int) -> Methods:
    """The results of the table's methods at a size."""
    return grouped((run for run in study.table_runs(store) if run.size == size), store, "table")


def grouped(runs: Iterable[Run], store: Store, part: str) -> Methods:
    """The measured results, by method, task and seed."""
    methods: Methods = {}
    for run in runs:
        if run.part == part and (result := store.get(run.key)):
            methods.setdefault(run.method, {})[run.task, run.seed] = result
    return methods


def shown(values: Sequence[float], sign: str = "") -> str | None:
    """Mean ± half of the interval, in points of per cent."""
    if not values:
        return None
    middle, half = mean_and_half([100 * value for value in values])
    return f"{middle:{sign}.1f} ± {half:.1f}" if math.isfinite(half) else f"{middle:{sign}.1f}"


def scores(study: Study, methods: Methods) -> list[Row]:
    """Mean scores of each task, and passes, a row for each method."""
    rows = []
    for name, results in methods.items():
        row: Row = {"method": name}
        for task in study.tasks:
            row[task] = shown([r["score"] for (key, _), r in results.items() if key == task])
        rows.append(
            row | {"passes": round(statistics.fmean(r["passes"] for r in results.values()))}
        )
    return rows


def differences(one: dict[Any, Result], other: dict[Any, Result]) -> list[float]:
    """The differences of scores over common tasks and seeds."""
    return [one[key]["score"] - other[key]["score"] for key in one if key in other]


def of_tasks(one: dict[Any, Result], other: dict[Any, Result]) -> list[float]:
    """The mean difference of each task. Seeds of one task share rows, so that its differences are
    not independent."""
    tasks = dict.fromkeys(task for task, _ in one)
    each = [differences({k: r for k, r in one.items() if k[0] == task}, other) for task in tasks]
    return [statistics.fmean(gaps) for gaps in each if gaps]


def compared(gaps: Sequence[float]) -> Row:
    """Win/tie/loss, and Wilcoxon's p of the differences that are not 0."""
    apart = [rounded for gap in gaps if (rounded := round(gap, DIGITS))]
    wins = sum(gap > 0 for gap in apart)
    counts = f"{wins}/{len(gaps) - len(apart)}/{len(apart) - wins}"
    return {"win/tie/loss": counts, "p": f"{wilcoxon(apart).pvalue:.2g}" if apart else None}


def pairs(methods: Methods) -> list[Row]:
    """Each method against DoRA of three times the steps."""
    base = methods.get(LONGER, {})
    return [
        {"method": name, "difference": shown(of_tasks(results, base), "+")}
        | compared(differences(results, base))
        for name, results in methods.items()
        if base and name != LONGER
    ]


def held_out(study: Study, store: Store, size: int) -> list[Row]:
    """The score on held-out training rows, the mean over the tasks, a row for each method.

    At each rate, one for all tasks, from the lowest to the highest; at the best of these; and at
    the rates, one for each task, that have the lowest loss of the same rows.
    """
    rows = []
    for name in study.table:
        results = [
            [store.get(run.key) for run in study.rates_runs(task, size, name)]
            for task in study.tasks
        ]
        measured = [[r for r in of_task if r is not None] for of_task in results]
        if len({len(of_task) for of_task in measured} | {len(study.rates_of(name))}) > 1:
            continue
        means = [statistics.fmean(r["score"] for r in column) for column in zip(*measured)]
        by_loss = [min(of_task, key=lambda r: r["loss"])["score"] for of_task in measured]
        row: Row = {"method": name}
        row |= dict(zip(("lowest rate", "middle", "highest"), means))
        row |= {"best of these": max(means), "rates by loss": statistics.fmean(by_loss)}
        rows.append({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def variants(study: Study, store: Store) -> list[Row]:
    """The difference that each change of the default makes on development rows."""
    methods = grouped(study.variants_runs(), store, "variants")
    base = methods.pop("default", {})
    return [
        {"change": name, "difference": shown(of_tasks(results, base), "+")}
        for name, results in methods.items()
    ]


def shift_table(study: Study, store: Store) -> list[Row]:
    """Accuracy of each pair of domains and number of target rows, and BiDoRA's lead."""
    sizes = study.shift["targets"]
    methods = {
        size: grouped((r for r in study.shift_runs() if r.size == size), store, "shift")
        for size in sizes
    }
    rows = []
    for name in study.shift["methods"]:
        row: Row = {"method": name}
        for size in sizes:
            results = methods[size].get(name, {})
            for task in dict.fromkeys(task for task, _ in results):
                values = [r["score"] for (key, _), r in results.items() if key == task]
                row[f"{task}, {size}"] = shown(values)
            lead = differences(methods[size].get(BIDORA, {}), results)
            row[f"BiDoRA − this, {size}"] = shown(lead, "+") if name != BIDORA else None
        rows.append(row)
    return rows if any(methods.values()) else []


def slopes(methods: Methods) -> list[Row]:
    """The line of ΔM on ΔD through all layers, tasks and seeds of a method."""
    rows = []
    for name, results in methods.items():
        points = [point for r in results.values() for point in r.get("changes", [])]
        if len(points) > 2 and any(change for _, change in points):
            directions, magnitudes = zip(*points)
            line = linregress(directions, magnitudes)
            half = line.stderr * student.ppf(0.975, len(points) - 2)
            row: Row = {"ΔM on ΔD": name, "slope": f"{line.slope:.2f} ± {half:.2f}"}
            rows.append(row | {"r": f"{line.rvalue:.2f}"})
    return rows


def figure(study: Study, store: Store) -> None:
    """The mean lead over DoRA with its interval, of each method and size."""
    sizes = {size: methods for size in study.sizes if (methods := of_size(study, store, size))}
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(9, 3.2), sharey=True, sharex=True, squeeze=False
    )
    figure.set_layout_engine("constrained")
    names = [name for name in study.table if name != DORA]
    for axis, (size, methods) in zip(axes.flat, sizes.items(), strict=True):
        for place, name in enumerate(reversed(names)):
            lead = of_tasks(methods.get(name, {}), methods.get(DORA, {}))
            if len(lead) > 1:
                middle, half = mean_and_half([100 * x for x in lead])
                axis.errorbar(middle, place, xerr=half, fmt="o", color="C0")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=f"{size} rows", xlabel="score − DoRA, points", yticks=range(len(names)))
        axis.set_yticklabels(reversed(names))
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)
