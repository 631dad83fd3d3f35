"""Writes the pages' tables and the figure from the stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean

from benchmarks import pages
from benchmarks.measure import table
from benchmarks.methods import calibration
from benchmarks.methods.runs import stored
from benchmarks.methods.settings import SETTINGS
from hyperopt_peft.comparison import AcrossTasks, Comparison
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.utils.verdict import Verdict

TABLES = pages.RESULTS / "methods.md"
PAGE, FIGURE = pages.DOCS / "results.md", pages.DOCS / "results.png"
#: The settings on BiDoRA's page, and the names of their tables.
OF_PAGE = {"magnitudes": "results", "magnitudes, base size": "base size"}
Row = dict[str, str]
Candidate = tuple[str, Kind]


def report(*, check: bool) -> None:
    """Write the tables between the marks of the pages, and the figure.

    Raises:
        SystemExit: with ``check``, if a page would change; nothing is written then.
    """
    settings = {name: tasks for name in SETTINGS if (tasks := complete(name))}
    none = "No setting is complete yet.\n"
    sections = {
        mark: f"{table(scores(settings[name]))}\n"
        for name, mark in OF_PAGE.items()
        if name in settings
    }
    pages.write(PAGE, sections or {"results": none}, check=check)
    zoo = [row for name in settings if name not in OF_PAGE for row in summary(name, settings[name])]
    short = f"{table(by_method(zoo))}\n" if zoo else none
    pages.write(pages.ROOT / "README.md", {"methods": short}, check=check)
    texts = [details(name, tasks) for name, tasks in settings.items()]
    texts = [f"### The published methods\n\n{table(zoo)}\n" if zoo else none, *texts]
    pages.write(TABLES, {"methods": "\n".join(texts)}, check=check)
    judged = {name: f"{table(rows)}\n" for name, rows in calibration.tables().items()}
    pages.write(pages.DOCS / "is-my-method-better.md", judged, check=check)
    if "magnitudes" in settings and not check:
        AcrossTasks(settings["magnitudes"]).plot(FIGURE)


def complete(name: str) -> dict[str, Comparison]:
    """The tasks of a setting of which all runs are stored."""
    return {task: each for task in SETTINGS[name].tasks if (each := stored(name, task))}


def summary(name: str, tasks: Mapping[str, Comparison]) -> Iterator[Row]:
    """For each published method, the differences to other methods and to its ablations."""
    setting = SETTINGS[name]
    others = [each for each in setting.methods() if each not in setting.papers]
    for method in setting.papers:
        for task, each in tasks.items():
            # By the held-out rows, as a user would choose; the test rows judge the choice.
            best = max(others, key=lambda other, c=each: held_out(c, other))
            references: dict[str, Candidate] = {
                f"− {each.first}": (each.first, "method"),
                "− frozen": (method, "frozen"),
                "− one level": (method, "one level"),
            }
            row = {"setting, task": f"{name}, {task}", "method": method}
            row["score"] = points(each.scores(method))
            for head, reference in references.items():
                trained = reference in each.plan.candidates()
                gaps = each.differences((method, "method"), reference) if trained else []
                row[head] = points(gaps, "+") if trained else "–"
            gaps = each.differences((method, "method"), (best, "method"))
            row["− best other method"] = f"{points(gaps, '+')} ({best})"
            yield row


def by_method(rows: Iterable[Row]) -> list[Row]:
    """The rows of `summary`, with one line for all tasks of a method."""
    joined: dict[str, Row] = {}
    for row in rows:
        setting, _, task = row["setting, task"].partition(", ")
        line = joined.setdefault(row["method"], {"method": row["method"], "on": f"{setting}:"})
        line["on"] += f"{',' * (line['on'][-1] != ':')} {task}"
        for head in ("− LoRA", "− frozen", "− best other method"):
            value = row[head].partition(" (")[0]
            line[head] = ", ".join(filter(None, [line.get(head), value]))
    return list(joined.values())


def held_out(comparison: Comparison, name: str) -> float:
    """The held-out score of a method at its chosen rates."""
    tried = comparison.plan.at_every_rate(comparison.store, name, "method")
    return max(score for grid in tried.values() for score in grid.values())


def scores(tasks: Mapping[str, Comparison]) -> list[Row]:
    """The scores on each task in points, with intervals over seeds, and the differences.

    Three tasks or more have a mean, and the differences' interval over tasks.
    """
    first = next(iter(tasks.values()))
    joined = AcrossTasks(tasks) if len(tasks) > 2 else None
    rows = []
    for name, kind in first.plan.candidates():
        row = {"method": name + ABLATIONS[kind]}
        for task, each in tasks.items():
            row[task] = points(each.scores(name, kind))
        pair = (name, kind), (first.first, "method")
        if joined:
            row["mean"] = f"{100 * fmean(joined.scores(name, kind)):.1f}"
        compared = [joined] if joined else tasks.values()
        gaps = ", ".join(points(each.differences(*pair), "+") for each in compared)
        rows.append(row | {f"− {first.first}": "–" if pair[0] == pair[1] else gaps})
    return rows


def points(values: Iterable[float], sign: str = "") -> str:
    """Mean ± half of the interval, in percentage points."""
    return Verdict(values, points=True).shown(sign)


def details(name: str, tasks: Mapping[str, Comparison]) -> str:
    """A setting's scores, sentences, held-out scores, chosen rates and prices."""
    sentences = []
    for task, each in tasks.items():
        lines = (sentence.replace("\n  ", "\n  - ") for sentence in each.sentences())
        sentences += [f"{task}:\n", *(f"- {line}" for line in lines), ""]
    setting = SETTINGS[name]
    return (
        f"### {name[0].upper()}{name[1:]}\n\n{table(scores(tasks))}\n\n"
        + "\n".join(sentences)
        + f"\n**Held-out score at every rate, means over tasks**\n\n{table(rates(tasks))}\n\n"
        f"**Chosen rates (upper rates), and price**, of {setting.passes:g} passes\n\n"
        f"{table(prices(tasks))}\n"
    )


def rates(tasks: Mapping[str, Comparison]) -> list[Row]:
    """The held-out score at each rate, and at each upper rate with the chosen rate."""
    plan, rows = next(iter(tasks.values())).plan, []
    for name, kind in plan.candidates():
        means: dict[str, list[float]] = {}
        for each in tasks.values():
            for head, score in tried(each, name, kind):
                means.setdefault(head, []).append(score)
        numbers = {head: f"{100 * fmean(values):.1f}" for head, values in means.items()}
        rows += [{"method": name + ABLATIONS[kind], **numbers}] if numbers else []
    upper = (f"upper {rate:g}" for rate in plan.choice.upper_rates)
    heads = ["method", *(f"{rate:g}" for rate in plan.choice.rates), *upper]
    return [{head: row.get(head, "–") for head in heads} for row in rows]


def tried(comparison: Comparison, name: str, kind: Kind) -> Iterator[tuple[str, float]]:
    """The held-out score by the rate, and by the upper rate."""
    tried = comparison.plan.at_every_rate(comparison.store, name, kind)
    for axis, grid in tried.items():
        for rate, score in grid.items():
            yield f"{'upper ' * (axis == 'upper_rate')}{rate:g}", score


def prices(tasks: Mapping[str, Comparison]) -> list[Row]:
    """The rates of each task, and the means over tasks of passes, seconds and memory."""
    tables = {task: each.table() for task, each in tasks.items()}
    rows = []
    for number, (name, kind) in enumerate(next(iter(tasks.values())).plan.candidates(), 1):
        row = {"method": name + ABLATIONS[kind]}
        cells = [dict(zip(lines[0], lines[number])) for lines in tables.values()]
        for task, cell in zip(tables, cells, strict=True):
            upper = f" ({cell['upper rate']})" if cell["upper rate"] else ""
            row[task] = cell["rate"] + upper
        row |= {key: f"{fmean(float(c[key]) for c in cells):.1f}" for key in ("passes", "seconds")}
        rows.append(row)
    return rows
