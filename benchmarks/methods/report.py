"""Tables and the figure of the study, from its stores alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean

from benchmarks import pages
from benchmarks.measure import table
from benchmarks.methods.cells import CELLS, TASKS, stored
from hyperopt_peft.comparison import AcrossTasks, Comparison
from hyperopt_peft.comparison.result import shown
from hyperopt_peft.comparison.task import ABLATIONS, Kind

TABLES = pages.RESULTS / "study.md"
PAGE, FIGURE = pages.DOCS / "results.md", pages.DOCS / "results.png"
Row = dict[str, str]


def report(*, check: bool) -> None:
    """Write the tables between the marks of both pages, and the figure.

    Raises:
        SystemExit: with ``check``, where a page would change; nothing is written then.
    """
    found = {cell: joined for cell in CELLS if (joined := across(cell))}
    none = "No budget is complete yet.\n"
    rows = [summary(cell, joined) for cell, joined in found.items()]
    pages.write(PAGE, {"results": f"{table(rows)}\n" if rows else none}, check=check)
    texts = [details(cell, joined) for cell, joined in found.items()]
    pages.write(TABLES, {"study": "\n".join(texts) or none}, check=check)
    if found and not check:
        next(iter(found.values())).plot(FIGURE)


def across(cell: str) -> AcrossTasks | None:
    """The tasks of a cell whose runs are all there, where these are two or more."""
    found = {name: each for name in TASKS if (each := stored(name, cell))}
    return AcrossTasks(found) if len(found) > 1 else None


def summary(cell: str, joined: AcrossTasks) -> Row:
    """The mean scores of a cell, and the differences of BiDoRA to DoRA and to its ablations."""
    row = {"rows, passes": cell.replace("x", ", "), "tasks": str(len(joined.comparisons))}
    for name in joined.plan.methods:
        row[name.removeprefix("BiDoRA, ")] = f"{100 * fmean(joined.scores(name)):.1f}"
    others: dict[str, tuple[str, Kind]] = {
        "DoRA": ("DoRA", "method"),
        "upper level frozen": ("BiDoRA", "frozen"),
        "one level": ("BiDoRA", "one level"),
    }
    for words, other in others.items():
        row[f"BiDoRA − {words}"] = points(joined.differences(("BiDoRA", "method"), other), "+")
    return row


def scores(joined: AcrossTasks) -> list[Row]:
    """The table of `AcrossTasks` in points, with the interval over the seeds of each task."""
    rows = []
    for name, kind in joined.plan.candidates():
        row = {"method": name + ABLATIONS[kind]}
        for task, each in joined.comparisons.items():
            row[task] = points(each.scores(name, kind))
        row["mean"] = f"{100 * fmean(joined.scores(name, kind)):.1f}"
        gaps = joined.differences((name, kind), (joined.first, "method"))
        of_first = (name, kind) == (joined.first, "method")
        rows.append(row | {f"− {joined.first}": "–" if of_first else points(gaps, "+")})
    return rows


def points(values: Iterable[float], sign: str = "") -> str:
    """Mean ± half of the interval in points of per cent."""
    return shown([100 * value for value in values], sign, 1)


def details(cell: str, joined: AcrossTasks) -> str:
    """The scores of a cell, the sentences, the held-out scores, the chosen rates, the price."""
    found = (sentence.replace("\n  ", "\n  - ") for sentence in joined.sentences())
    sentences = "\n".join(f"- {sentence}" for sentence in found)
    return (
        "### {} rows, {} passes\n\n".format(*cell.split("x"))
        + f"{table(scores(joined))}\n\n{sentences}\n\n"
        f"**Held-out score at every rate, means over tasks**\n\n{table(rates(joined))}\n\n"
        f"**Chosen rates (upper rates), and price**\n\n{table(prices(joined))}\n"
    )


def rates(joined: AcrossTasks) -> list[Row]:
    """The held-out score at each rate, and at each upper rate with the chosen rate."""
    rows = []
    for name, kind in joined.plan.candidates():
        means: dict[str, list[float]] = {}
        for each in joined.comparisons.values():
            for head, score in tried(each, name, kind):
                means.setdefault(head, []).append(score)
        numbers = {head: f"{100 * fmean(values):.1f}" for head, values in means.items()}
        rows += [{"method": name + ABLATIONS[kind], **numbers}] if numbers else []
    plan = joined.plan
    upper = (f"upper {rate:g}" for rate in plan.upper_rates)
    heads = ["method", *(f"{rate:g}" for rate in plan.rates), *upper]
    return [{head: row.get(head, "–") for head in heads} for row in rows]


def tried(comparison: Comparison, name: str, kind: Kind) -> Iterator[tuple[str, float]]:
    """The held-out score by the rate, and by the upper rate."""
    plan, store = comparison.plan, comparison.store
    middle = plan.upper_rates[len(plan.upper_rates) // 2]
    for run, score in plan.at_every_rate(store, name, kind):
        if run.upper_rate in (None, middle):
            yield f"{run.rate:g}", score
        if run.upper_rate and run.rate == plan.chosen(store, name, kind).rate:
            yield f"upper {run.upper_rate:g}", score


def prices(joined: AcrossTasks) -> list[Row]:
    """The rates of each task, and the means over tasks of passes, seconds and memory."""
    tables = {task: each.table() for task, each in joined.comparisons.items()}
    rows = []
    for number, (name, kind) in enumerate(joined.plan.candidates(), 1):
        row = {"method": name + ABLATIONS[kind]}
        cells = [dict(zip(lines[0], lines[number])) for lines in tables.values()]
        for task, cell in zip(tables, cells, strict=True):
            upper = f" ({cell['upper rate']})" if cell["upper rate"] else ""
            row[task] = cell["rate"] + upper
        row |= {key: f"{fmean(float(c[key]) for c in cells):.1f}" for key in ("passes", "seconds")}
        rows.append(row)
    return rows
