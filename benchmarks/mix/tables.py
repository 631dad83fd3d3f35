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
#: The tasks that come last.
SIMULATED = ("copies", "annotators")
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
    """The methods of ``cell`` that have as many seeds as any other."""
    most = max(map(len, cell.values()))
    return {method: by_seed for method, by_seed in cell.items() if len(by_seed) == most}


def accuracy(by_seed: Mapping[int, Row]) -> float:
    """The mean over the seeds."""
    return statistics.fmean(row["accuracy"] for row in by_seed.values())


def best_of(cell: Cell, without: tuple[str, ...] = (VERDICT,)) -> str:
    """The method of the highest mean accuracy."""
    return max((m for m in cell if m not in without), key=lambda method: accuracy(cell[method]))


def best_elsewhere(cell: Cell, seed: int) -> str:
    """The method of the highest mean accuracy on all seeds but ``seed``.

    The best of many methods on some seeds is partly so by their luck. ``seed`` has none in it.
    """
    return best_of({m: {s: row for s, row in c.items() if s != seed} for m, c in cell.items()})


def regrets(of_model: Mapping[str, Cell]) -> dict[str, list[float]]:
    """Of each method its distance to the best one's mean accuracy, in each cell that has it."""
    found: dict[str, list[float]] = {}
    for cell in of_model.values():
        top = accuracy(cell[best_of(cell)])
        for method, by_seed in cell.items():
            found.setdefault(method, []).append(top - accuracy(by_seed))
    return found


def regrets_elsewhere(of_model: Mapping[str, Cell]) -> dict[str, list[float]]:
    """As `regrets`, seed by seed to the method that is the best one on the other seeds."""
    found: dict[str, list[float]] = {}
    for cell in of_model.values():
        best = {seed: best_elsewhere(cell, seed) for seed in next(iter(cell.values()))}
        top = statistics.fmean(cell[best[seed]][seed]["accuracy"] for seed in best)
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
        error = math.sqrt(top * (1 - top) / cell[VERDICT][seed]["tests"])
        good.append(top - row["accuracy"] <= error)
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
        row["named well"] = _number(near_the_best(cell, named)) if named else None
        if len(named) > 1:
            known = {seed: cell[best_elsewhere(cell, seed)][seed] for seed in named}
            row["best of other seeds, well"] = _number(near_the_best(cell, known))
        for title in ("seconds", "verdict seconds"):
            measured = [each[title] for each in named.values() if title in each]
            row[title] = f"{statistics.fmean(measured):.1f}" if measured else None
        lines.append(row)
    return lines


def _number(good: list[bool]) -> str:
    return f"{sum(good)} of {len(good)}"


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """Accuracies and the summary of each model, and the regrets of all methods."""
    by_model = {model: found for model in MODELS if (found := cells(runs, model))}
    methods = list(dict.fromkeys(m for of in by_model.values() for c in of.values() for m in c))
    methods.sort(key=VERDICT.__eq__)  # last
    tables = {"Regret": [_regret(method, by_model) for method in methods]} if by_model else {}
    for model, found in by_model.items():
        tables[f"Learned weights and the best simple way, {model}"] = summary(found)
        tables[f"Accuracy, {model}"] = [
            {"method": m}
            | {name: f"{accuracy(c[m]):.3f}"[1:] if m in c else None for name, c in found.items()}
            for m in methods
        ]
    return tables


def _regret(method: str, by_model: Mapping[str, Mapping[str, Cell]]) -> Row:
    tasks = (cell for found in by_model.values() for cell in found if method in found[cell])
    row: Row = {"method": method, "tasks": len({*tasks})}
    for model, found in by_model.items():
        each = regrets(found).get(method)
        row[f"{model}, mean"] = f"{statistics.fmean(each):.3f}" if each else None
        row[f"{model}, worst"] = f"{max(each):.3f}" if each else None
        if all(len(by_seed) > 1 for cell in found.values() for by_seed in cell.values()):
            fair = regrets_elsewhere(found).get(method)
            row[f"{model}, to the best of other seeds"] = (
                f"{statistics.fmean(fair):.3f}" if fair else None
            )
    return row
