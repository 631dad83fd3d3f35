"""The tables of `cells`, made of the entries of its file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.measure import mean_and_half
from benchmarks.store import Row, Store
from hyperopt_peft.problems.mix_plans import LEARNED, LEARNED_THEN

VERDICT = "the named way"
MODELS = ("head", "lora")
#: The tasks that come last, and those whose target is another domain on each seed.
SIMULATED, ANOTHER_TARGET = ("copies", "annotators"), ("domains", "copies")
#: Of each method, the entries by seed.
Cell = Mapping[str, Mapping[int, Row]]


def cells(runs: Store, model: str) -> dict[str, Cell]:
    """The measured entries of each task and number of trusted rows, of methods with all seeds."""
    found: dict[str, dict[str, dict[int, Row]]] = {}
    for row in runs.of(model):
        if "accuracy" in row:
            cell = found.setdefault(f"{row['task']} {row['trusted']}", {})
            cell.setdefault(row["method"], {})[row["seed"]] = row
    return {name: _complete(found[name]) for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[bool, str, int]:
    task, trusted = name.split()
    return task in SIMULATED, task, int(trusted)


def _complete(cell: Cell) -> Cell:
    """The methods of ``cell`` that have all the seeds of any."""
    seeds = set().union(*cell.values())
    return {method: by_seed for method, by_seed in cell.items() if by_seed.keys() == seeds}


def accuracy(by_seed: Mapping[int, Row]) -> float:
    """The mean over the seeds."""
    return statistics.fmean(row["accuracy"] for row in by_seed.values())


def best_of(cell: Cell, without: tuple[str, ...] = (VERDICT,)) -> str:
    """The method of the highest mean accuracy."""
    return max((m for m in cell if m not in without), key=lambda method: accuracy(cell[method]))


def best_of_others(cell: Cell, seed: int) -> str:
    """The method of the highest mean accuracy on all seeds but ``seed``.

    The best of many methods is so partly by the luck of the seeds that it is the best of.
    """
    return best_of({m: {s: row for s, row in c.items() if s != seed} for m, c in cell.items()})


def regrets(of_model: Mapping[str, Cell], *, left_out: bool = False) -> dict[str, list[float]]:
    """Of each method its distance to the best one's mean accuracy, in each cell that has it.

    The best one is that of all seeds or, with ``left_out``, for each seed that of all others.
    """
    found: dict[str, list[float]] = {}
    for cell in of_model.values():
        seeds = next(iter(cell.values()))
        best = {s: best_of_others(cell, s) if left_out else best_of(cell) for s in seeds}
        top = statistics.fmean(cell[best[seed]][seed]["accuracy"] for seed in seeds)
        for method, by_seed in cell.items():
            found.setdefault(method, []).append(top - accuracy(by_seed))
    return found


def near_the_best(cell: Cell, chosen: Mapping[int, Row]) -> list[bool]:
    """Whether what is chosen for a seed is within one standard error of its best method.

    The error is that of the best one's accuracy on the test rows.
    """
    good = []
    for seed, row in chosen.items():
        top = max(by_seed[seed]["accuracy"] for by_seed in cell.values())
        good.append(top - row["accuracy"] <= math.sqrt(top * (1 - top) / row["tests"]))
    return good


def lead(cell: Cell, method: str) -> Iterator[tuple[str, str]]:
    """``method``, the best of the simple ones, and the difference with its paired interval."""
    best = best_of(cell, (VERDICT, LEARNED, LEARNED_THEN))
    seeds = cell[method].keys() & cell[best].keys()
    gaps = [cell[method][s]["accuracy"] - cell[best][s]["accuracy"] for s in sorted(seeds)]
    middle, half = mean_and_half(gaps)
    yield method, f"{accuracy(cell[method]):.3f}"
    yield "best simple way", f"{best}, {accuracy(cell[best]):.3f}"
    yield "difference", f"{middle:+.3f} ± {half:.3f}"


def summary(of_model: Mapping[str, Cell]) -> list[Row]:
    """Of each cell the learned weights beside the best simple way, the verdict, the search."""
    lines = []
    for name, cell in of_model.items():
        row: dict[str, Any] = {"task": name, **dict(lead(cell, LEARNED))}
        named = cell.get(VERDICT, {})
        good = near_the_best(cell, named)
        row["named well"] = f"{sum(good)} of {len(good)}" if good else None
        for title in ("seconds", "verdict seconds"):
            measured = [each[title] for each in named.values() if title in each]
            row[title] = f"{statistics.fmean(measured):.1f}" if measured else None
        lines.append(row)
    return lines


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """Accuracies and the summary of each model, and the regrets of all methods."""
    by_model = {model: found for model in MODELS if (found := cells(runs, model))}
    methods = list(dict.fromkeys(m for of in by_model.values() for c in of.values() for m in c))
    methods.sort(key=VERDICT.__eq__)  # last
    tables = _regrets(methods, by_model)
    for model, found in by_model.items():
        tables[f"Learned weights and the best simple way, {model}"] = summary(found)
        tables[f"Accuracy, {model}"] = [
            {"method": m}
            | {name: f"{accuracy(c[m]):.3f}"[1:] if m in c else None for name, c in found.items()}
            for m in methods
        ]
    return tables


def _regrets(
    methods: list[str], by_model: Mapping[str, Mapping[str, Cell]]
) -> dict[str, list[Row]]:
    """The regrets in all cells, and in those whose task is the same on all seeds."""
    everywhere: dict[str, Row] = {method: {"method": method} for method in methods}
    one_task: dict[str, Row] = {method: {"method": method} for method in methods}
    for model, found in by_model.items():
        same = {n: c for n, c in found.items() if n.split()[0] not in ANOTHER_TARGET}
        several = all(len(by_seed) > 1 for cell in same.values() for by_seed in cell.values())
        values, left_out = regrets(found), regrets(same, left_out=True) if several else {}
        of_same = regrets(same)
        for method in methods:
            each = values.get(method, [])
            row = everywhere[method]
            row["cells"] = max(row.get("cells", 0), len(each))
            row[f"{model}, mean"] = f"{statistics.fmean(each):.3f}" if each else None
            row[f"{model}, worst"] = f"{max(each):.3f}" if each else None
            row = one_task[method]
            for title, of in (("the best", of_same), ("the best of other seeds", left_out)):
                middle, half = mean_and_half(of.get(method) or [math.nan])
                row[f"{model}, to {title}"] = (
                    f"{middle:.3f} ± {half:.3f}" if math.isfinite(half) else None
                )
    tables = {"Regret": [*everywhere.values()]}
    tables["Regret where the task is the same on all seeds"] = [*one_task.values()]
    return tables if by_model else {}
