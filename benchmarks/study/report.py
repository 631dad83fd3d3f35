"""Tables and the figure of the study, from its result file alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks import pages
from benchmarks.measure import mean_and_half, table
from benchmarks.store import MEASURED, Store
from benchmarks.study.plan import DORA, FROZEN, STOPPED, Run, Study
from hyperopt_peft.utils.plots import lines

PAGE, FIGURE = pages.RESULTS / "study.md", pages.DOCS / "results.png"
Row = dict[str, Any]
Cell = tuple[int, int]
#: Of a method, the results by task and seed.
Methods = dict[str, dict[tuple[str, int], Row]]


def report(study: Study, store: Store, *, check: bool) -> None:
    """Write the tables between the marks of benchmarks/results/study.md, and the figure of docs.

    Raises:
        SystemExit: with ``check``, where the page would change; nothing is written then.
    """
    pages.write(PAGE, {"study": sections(study, store)}, check=check)
    if not check:
        figure(study, store)


def sections(study: Study, store: Store) -> str:
    """The tables of all runs that are there, as Markdown."""
    tables: dict[str, list[Row]] = {}
    for size in dict.fromkeys(size for size, _ in study.cells):
        cells = [cell for cell in study.cells if cell[0] == size]
        tables[f"{size} rows, rate and passes tuned: test score"] = tuned(study, store, cells)
        for cell in sorted(cells):
            title, methods = f"{size} rows, {cell[1]} passes", judged(study, store, cell)
            tables[f"{title}: test score"] = scores(study, store, cell, methods)
            tables[f"{title}: fit and calibration, means over tasks"] = fits(methods)
        tables[f"{size} rows: score on held-out rows at every rate"] = rates(study, store, cells)
        title = f"{size} rows: the best rate of each task, and its score on held-out rows"
        tables[title] = rates_of_tasks(study, store, cells)
    tables["All six layers adapted, {} rows, {} passes".format(*study.check)] = checks(study, store)
    texts = [f"**{title}**\n\n{table(rows)}\n" for title, rows in tables.items() if rows]
    if MEASURED in store.by_key:
        texts.append(pages.machine_line(store.by_key[MEASURED]))
    return "\n".join(texts or ["No table is complete yet.\n"])


def judged(study: Study, store: Store, cell: Cell) -> Methods:
    """The results on test rows of a cell, of methods with all tasks and seeds."""
    methods = grouped(study.judged(store, cell), store)
    complete = len(study.tasks) * len(study.seeds)
    return {name: results for name, results in methods.items() if len(results) == complete}


def grouped(runs: Iterable[Run], store: Store) -> Methods:
    """The measured results, by method, task and seed."""
    methods: Methods = {}
    for run in runs:
        if result := store.get(run.key):
            methods.setdefault(run.method, {})[run.task, run.seed] = result
    return methods


def of_tasks(
    one: dict[Any, Row], other: dict[Any, Row], value: Callable[[Row], float]
) -> list[float]:
    """The mean difference of each task, over its seeds.

    Seeds of one task share rows, so that its differences are not independent.
    """
    gaps: dict[str, list[float]] = {}
    for task, seed in one:
        if (task, seed) in other:
            gap = value(one[task, seed]) - value(other[task, seed])
            gaps.setdefault(task, []).append(gap)
    return [statistics.fmean(each) for each in gaps.values()]


def shown(values: Sequence[float], scale: float = 100, form: str = ".1f") -> str:
    """Mean ± half of the interval, by default in points of per cent."""
    middle, half = mean_and_half([scale * value for value in values])
    text = f"{middle:{form}}"
    return f"{text} ± {half:{form.removeprefix('+')}}" if math.isfinite(half) else text


def score(result: Row) -> float:
    """The score on test rows."""
    return float(result["test"]["score"])


def scores(study: Study, store: Store, cell: Cell, methods: Methods) -> list[Row]:
    """The score of each method on each task, its lead over DoRA, and its price."""
    rows = []
    for name, results in methods.items():
        if name == STOPPED:
            continue
        rates = study.chosen(store, cell, name)
        row: Row = {"method": name, "rate": f"{rates['rate']:g}"}
        row["upper rate"] = f"{rates['upper_rate']:g}" if "upper_rate" in rates else None
        rows.append(row | of_method(results, methods.get(DORA, {})))
    return rows


def of_method(results: dict[Any, Row], base: dict[Any, Row]) -> Row:
    """The scores of a method by task, with their mean, the lead over ``base``, and seconds."""
    row: Row = {}
    for task in dict.fromkeys(task for task, _ in results):
        row[task] = shown([score(r) for (each, _), r in results.items() if each == task])
    row["mean"] = f"{100 * statistics.fmean(map(score, results.values())):.1f}"
    lead = of_tasks(results, base, score)
    row["− DoRA"] = shown(lead, form="+.1f") if lead and base is not results else None
    return row | {"seconds": f"{statistics.fmean(r['seconds'] for r in results.values()):.1f}"}


def fits(methods: Methods) -> list[Row]:
    """Training and test of each method, and the test loss above DoRA stopped where BiDoRA ends."""
    rows = []
    for name, results in methods.items():

        def mean(part: str, value: str, results: dict[Any, Row] = results) -> float:
            return statistics.fmean(result[part][value] for result in results.values())

        row: Row = {"method": name}
        for part in ("train", "test"):
            row[f"{part} score"] = f"{100 * mean(part, 'score'):.1f}"
            row[f"{part} loss"] = f"{mean(part, 'loss'):.3f}"
        row["ECE"] = f"{mean('test', 'ece'):.3f}"
        row["loss, scaled"], row["ECE, scaled"] = (
            f"{mean('scaled', value):.3f}" for value in ("loss", "ece")
        )
        gaps = of_tasks(results, methods.get(STOPPED, {}), lambda r: float(r["test"]["loss"]))
        lead = shown(gaps, 1, "+.3f") if gaps and name != STOPPED else None
        rows.append(row | {"test loss − DoRA, stopped": lead})
    return rows


def tuned(study: Study, store: Store, cells: Sequence[Cell]) -> list[Row]:
    """Of each method the cell of the best held-out score, where all cells are complete."""
    of_cells = {cell: judged(study, store, cell) for cell in cells}
    best: dict[str, Cell] = {}
    for name in study.methods:
        if name != FROZEN and all(name in methods for methods in of_cells.values()):
            best[name] = max(cells, key=lambda c, name=name: highest(study, store, c, name))
    if DORA not in best:
        return []
    base = of_cells[best[DORA]][DORA]
    return [
        {"method": name, "passes": cell[1]} | of_method(of_cells[cell][name], base)
        for name, cell in best.items()
    ]


def highest(study: Study, store: Store, cell: Cell, method: str) -> float:
    """The held-out score of the rates that are chosen for a method."""
    rates = study.chosen(store, cell, method)
    return study.score(store, study.trials(cell, method, **rates)) or 0.0


def known_trials(
    study: Study, store: Store, cells: Sequence[Cell]
) -> Iterator[tuple[Row, list[dict[str, Any]], list[list[Run]]]]:
    """Of each cell and method whose trials are complete: names, candidates, and runs of each."""
    for cell in sorted(cells):
        for method in (each for each in study.methods if each != FROZEN):
            candidates = study.candidates(store, cell, method)
            if study.best(store, cell, method, candidates):
                trials = [study.trials(cell, method, **each) for each in candidates]
                yield {"method": method, "passes": cell[1]}, candidates, trials


def rates(study: Study, store: Store, cells: Sequence[Cell]) -> list[Row]:
    """The held-out score at each rate, the mean over tasks and seeds of development.

    The last column has a rate for each task, chosen on all seeds but one and scored on that one.
    """
    rows = []
    for row, _, trials in known_trials(study, store, cells):
        found = [study.score(store, runs) or 0.0 for runs in trials]
        of_rates = found[: len(study.rates)]
        row |= {f"{r:g}": f"{s:.3f}" for r, s in zip(study.rates, of_rates)}
        upper = zip(study.upper_rates[1:], found[len(study.rates) :])
        row["other upper rates"] = "; ".join(f"{r:g}: {s:.3f}" for r, s in upper) or None
        row["a rate a task"] = f"{per_task(study, store, trials):.3f}"
        rows.append(row)
    return rows


def rates_of_tasks(study: Study, store: Store, cells: Sequence[Cell]) -> list[Row]:
    """The rate of the highest mean held-out score of each task, with that score."""
    rows = []
    for row, candidates, trials in known_trials(study, store, cells):
        scores = held_out(store, trials)
        for task in study.tasks:
            means = [statistics.fmean(x for (t, _), x in s.items() if t == task) for s in scores]
            best = max(range(len(means)), key=means.__getitem__)
            row[task] = f"{candidates[best]['rate']:g}: {means[best]:.3f}"
        rows.append(row)
    return rows


def held_out(store: Store, trials: Sequence[Sequence[Run]]) -> list[dict[tuple[str, int], float]]:
    """The held-out scores of each candidate's runs, by task and seed."""
    return [
        {(run.task, run.seed): store.by_key[run.key]["held_out"]["score"] for run in runs}
        for runs in trials
    ]


def per_task(study: Study, store: Store, trials: Sequence[Sequence[Run]]) -> float:
    """The held-out score where each task has the best candidate of its other seeds."""
    scores = held_out(store, trials)
    left_out = []
    seeds = list(dict.fromkeys(seed for _, seed in scores[0]))
    for task in study.tasks:
        for seed in seeds:
            others = [each for each in seeds if each != seed] or [seed]
            best = max(scores, key=lambda s: sum(s[task, each] for each in others))
            left_out.append(best[task, seed])
    return statistics.fmean(left_out)


def checks(study: Study, store: Store) -> list[Row]:
    """All layers adapted, one seed: each method at the best of its rates by held-out rows."""
    runs = [run for run in study.checks(store) if store.get(run.key)]
    best: dict[str, tuple[float, dict[Any, Row]]] = {}
    for name in dict.fromkeys(run.method for run in runs):
        for rate in study.rates:
            results = grouped((r for r in runs if (r.method, r.rate) == (name, rate)), store)
            of_rate = results.get(name, {})
            if len(of_rate) == len(study.tasks):
                mean = statistics.fmean(r["held_out"]["score"] for r in of_rate.values())
                best[name] = max(best.get(name, (-1.0, {})), (mean, of_rate), key=lambda b: b[0])
    base = best.get(DORA, (0.0, {}))[1]
    return [{"method": name} | of_method(results, base) for name, (_, results) in best.items()]


def rate_curves(study: Study, store: Store, cell: Cell) -> dict[str, Any]:
    """The rates and the held-out score of each method at them, where all are measured."""
    curves = {}
    for method in (each for each in study.methods if each != FROZEN):
        candidates = study.candidates(store, cell, method)[: len(study.rates)]
        found = [study.score(store, study.trials(cell, method, **each)) for each in candidates]
        if found.count(None) == 0 and len(found) == len(study.rates):
            curves[method] = (study.rates, found)
    return curves


def figure(study: Study, store: Store) -> None:
    """The held-out score over the rate, a panel for each cell and a line for each method."""
    panels = {cell: rate_curves(study, store, cell) for cell in sorted(study.cells)}
    titled = {"{} rows, {} passes".format(*cell): found for cell, found in panels.items() if found}
    if titled:
        ylabel = "score on held-out rows"
        lines(titled, FIGURE, xlabel="rate", ylabel=ylabel, xscale="log")
