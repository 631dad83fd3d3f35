"""Tables, statistics and figures of a study, from its result files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measure import mean_and_half, table
from plan import Run, Study
from scipy import stats
from scipy.stats import rankdata, spearmanr, wilcoxon
from write_results import between

DOCS = Path(__file__).parents[2] / "docs"
PAGE, FIGURE = DOCS / "results.md", DOCS / "results.png"
#: What others are compared with: DoRA of as many steps, and of as many passes as BiDoRA.
DORA, LONGER = "DoRA", "DoRA, three times the steps"
BIDORA, PUBLISHED, STILL = "BiDoRA", "BiDoRA, published", "BiDoRA, upper rate 0"
#: Of a difference of scores; what is zero then is a tie.
DIGITS = 9
Result = dict[str, Any]
Row = dict[str, Any]
#: Of a method, the results by task and seed.
Methods = dict[str, dict[tuple[str, int], Result]]


def report(study: Study, folder: Path, *, check: bool) -> None:
    """Write the tables between the marks of docs/results.md, and its figure.

    Raises:
        SystemExit: with ``check``, where the page would change; nothing is written then.
    """
    page = PAGE.read_text()
    for name, text in sections(study, folder).items():
        page = between(page, text, f"study {name}")
    if check:
        if page != PAGE.read_text():
            raise SystemExit(f"{PAGE.name} is not what the results give: run the report")
        return
    PAGE.write_text(page)
    if FIGURE.name in page:  # once there are runs to draw
        figure(study, folder)


def sections(study: Study, folder: Path) -> dict[str, str]:
    """The texts of the page by the names of their marks."""
    largest = of_size(study, folder, max(study.sizes))
    found = {
        "runs": joined(counts(study, folder)),
        "variants": joined(variants(study, folder)),
        "shift": joined(*shift_tables(study, folder)),
        "rates": joined(rates(study, folder)),
        "analysis": joined(slopes(largest), overfitting(largest), noise(largest)),
    }
    for size in study.sizes:
        methods = of_size(study, folder, size)
        found[f"scores {size}"] = joined(scores(study, methods))
        found[f"pairs {size}"] = joined(pairs(methods))
    return found


def joined(*tables: Sequence[Row]) -> str:
    """The tables that have rows, as Markdown."""
    return "\n\n".join(table(rows) for rows in tables if rows) or "Not run."


def counts(study: Study, folder: Path) -> list[Row]:
    """How many runs of each part there are, and how many are missing."""
    cells = [
        (task, size, name) for size in study.sizes for task in study.tasks for name in study.table
    ]
    plans = {
        "variants": list(study.variants_runs()),
        "rates": [run for cell in cells for run in study.rates_runs(*cell)],
        "shift": list(study.shift_runs()),
    }
    done = {part: sum(r.path(folder).exists() for r in runs) for part, runs in plans.items()}
    planned = {part: len(runs) for part, runs in plans.items()}
    for size in study.sizes:
        part, methods = f"table, {size} rows", of_size(study, folder, size)
        done[part] = sum(len(results) for results in methods.values())
        planned[part] = len(study.seeds) * len(study.tasks) * len(study.table)
    return [
        {"part": part, "runs": count, "measured": done[part], "missing": count - done[part]}
        for part, count in planned.items()
    ]


def of_size(study: Study, folder: Path, size: int) -> Methods:
    """The results of the table's methods at a size."""
    return grouped((run for run in study.table_runs(folder) if run.size == size), folder, "table")


def grouped(runs: Iterable[Run], folder: Path, part: str) -> Methods:
    """The results that there are, by method, task and seed."""
    found: Methods = {}
    for run in runs:
        if run.part == part and (result := run.result(folder)):
            found.setdefault(run.method, {})[run.task, run.seed] = result
    return found


def shown(values: Sequence[float], sign: str = "") -> str | None:
    """Mean ± half of the interval, in points of per cent."""
    if not values:
        return None
    middle, half = mean_and_half([100 * value for value in values])
    return f"{middle:{sign}.1f} ± {half:.1f}" if math.isfinite(half) else f"{middle:{sign}.1f}"


def scores(study: Study, methods: Methods) -> list[Row]:
    """Mean scores of each task, passes and seconds, a row a method."""
    found = []
    for name, results in methods.items():
        row: Row = {"method": name}
        for task in study.tasks:
            row[task] = shown([r["score"] for (key, _), r in results.items() if key == task])
        row["passes"] = round(statistics.fmean(r["passes"] for r in results.values()))
        row["seconds"] = round(statistics.median(r["seconds"] for r in results.values()), 1)
        found.append(row)
    return found


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
    """Win/tie/loss, Wilcoxon's p, and the matched-pairs rank correlation."""
    apart = [rounded for gap in gaps if (rounded := round(gap, DIGITS))]
    wins = sum(gap > 0 for gap in apart)
    p = effect = None
    if apart:
        ranks = rankdata([abs(gap) for gap in apart])
        effect = f"{sum(map(math.copysign, ranks, apart)) / sum(ranks):+.2f}"
        p = f"{wilcoxon(apart).pvalue:.2g}"
    counts = f"{wins}/{len(gaps) - len(apart)}/{len(apart) - wins}"
    return {"win/tie/loss": counts, "p": p, "effect": effect}


def pairs(methods: Methods) -> list[Row]:
    """Each method against DoRA and against DoRA of three times the steps, and BiDoRA's variants."""
    asked = [(name, base) for base in (DORA, LONGER) for name in methods if name != base]
    found = []
    for name, base in [*asked, (BIDORA, STILL), (BIDORA, PUBLISHED)]:
        if name in methods and base in methods:
            one, other = methods[name], methods[base]
            gaps = differences(one, other)
            row: Row = {"method": name, "against": base}
            row["difference"] = shown(of_tasks(one, other), "+")
            found.append(row | compared(gaps) | {"n": len(gaps)})
    return found


def rates(study: Study, folder: Path) -> list[Row]:
    """The rates that were chosen, a row a method."""
    return [
        {"method": name}
        | {
            f"{task}, {size}": study.chosen(folder, task, size, name)
            for size in study.sizes
            for task in study.tasks
        }
        for name in study.table
    ]


def variants(study: Study, folder: Path) -> list[Row]:
    """Each change of the default on development rows, and its difference."""
    methods = grouped(study.variants_runs(), folder, "variants")
    found = []
    for name, results in methods.items():
        row: Row = {"change": name}
        for task in study.development["tasks"]:
            row[task] = shown([r["score"] for (key, _), r in results.items() if key == task])
        gaps = [] if name == "default" else of_tasks(results, methods["default"])
        row["difference"] = shown(gaps, "+")
        row["passes"] = round(statistics.fmean(r["passes"] for r in results.values()))
        row["seconds"] = round(statistics.median(r["seconds"] for r in results.values()), 1)
        found.append(row)
    return found


def shift_tables(study: Study, folder: Path) -> list[list[Row]]:
    """A table a number of target rows: accuracy of each pair, and BiDoRA's lead."""
    found = []
    for size in study.shift["targets"]:
        runs = (run for run in study.shift_runs() if run.size == size)
        methods = grouped(runs, folder, "shift")
        rows = []
        for name, results in methods.items():
            row: Row = {f"{size} target rows": name}
            for task in dict.fromkeys(key for key, _ in results):
                row[task] = shown([r["score"] for (key, _), r in results.items() if key == task])
            gaps = [] if name == BIDORA else differences(methods.get(BIDORA, {}), results)
            row["BiDoRA − this"] = shown(gaps, "+")
            row["passes"] = round(statistics.fmean(r["passes"] for r in results.values()))
            rows.append(row)
        found.append(rows)
    return found


def slopes(methods: Methods) -> list[Row]:
    """The line of ΔM on ΔD through all layers, tasks and seeds of a method."""
    found = []
    for name, results in methods.items():
        points = [point for r in results.values() for point in r.get("changes", [])]
        if len(points) > 2 and any(change for _, change in points):
            fit = stats.linregress(*zip(*points, strict=True))
            half = stats.t.ppf(0.975, len(points) - 2) * fit.stderr
            low, high = fit.slope - half, fit.slope + half
            row: Row = {"ΔM on ΔD": name, "slope": f"{fit.slope:.2f} ({low:.2f} to {high:.2f})"}
            row |= {"r": f"{fit.rvalue:.2f}", "mean ΔD": statistics.fmean(d for d, _ in points)}
            found.append(row | {"mean ΔM": statistics.fmean(m for _, m in points)})
    return found


def overfitting(methods: Methods) -> list[Row]:
    """Scores of training and test rows."""
    return [
        {
            "method": name,
            "training score": shown([r["train score"] for r in results.values()]),
            "test score": shown([r["score"] for r in results.values()]),
            "gap": shown([r["train score"] - r["score"] for r in results.values()]),
        }
        for name, results in methods.items()
    ]


def noise(methods: Methods) -> list[Row]:
    """The hypergradient's signal-to-noise ratio over the search, and what it says of the gain."""
    found = []
    for name in (BIDORA, PUBLISHED):
        base = methods.get(LONGER, {})
        known = {k: r for k, r in methods.get(name, {}).items() if r.get("signal to noise")}
        common = [key for key in known if key in base]
        if len(common) < 3:
            continue
        series = [known[key]["signal to noise"] for key in common]
        ranks = spearmanr(
            [statistics.fmean(values) for values in series],
            [known[key]["score"] - base[key]["score"] for key in common],
        )
        row: Row = {"signal to noise, median": name}
        row["first quarter"] = statistics.median(values[0] for values in series)
        row["last quarter"] = statistics.median(values[-1] for values in series)
        row["rank correlation with the gain"] = f"{ranks.statistic:.2f}"
        found.append(row | {"p": f"{ranks.pvalue:.2g}", "n": len(common)})
    return found


def figure(study: Study, folder: Path) -> None:
    """The mean lead over DoRA with its interval, of each method and size."""
    sizes = {size: methods for size in study.sizes if (methods := of_size(study, folder, size))}
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
