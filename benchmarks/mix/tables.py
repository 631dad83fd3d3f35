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
#: Of each method, the entries by seed.
Cell = Mapping[str, Mapping[int, Row]]


def cells(runs: Store, model: str) -> dict[str, Cell]:
    """The measured entries of each task and number of trusted rows, of methods with all seeds."""
    found: dict[str, dict[str, dict[int, Row]]] = {}
    for row in runs.of(model):
        if "accuracy" in row:
            cell = found.setdefault(f"{row['task']} {row['trusted']}", {})
            cell.setdefault(row["method"], {})[row["seed"]] = row
    return {name: _complete(cell) for name, cell in found.items()}


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


def regrets(of_model: Mapping[str, Cell]) -> dict[str, list[float]]:
    """Of each method its distance to the best one's mean accuracy, in each cell that has it."""
    found: dict[str, list[float]] = {}
    for cell in of_model.values():
        top = accuracy(cell[best_of(cell)])
        for method, by_seed in cell.items():
            found.setdefault(method, []).append(top - accuracy(by_seed))
    return found


def named_well(cell: Cell) -> list[bool]:
    """Whether the named method is within one standard error of the best one, for each seed.

    The error is that of the best one's accuracy on the test rows.
    """
    good = []
    for seed, named in cell[VERDICT].items():
        top = max(by_seed[seed]["accuracy"] for by_seed in cell.values() if seed in by_seed)
        error = math.sqrt(top * (1 - top) / named["tests"])
        good.append(top - named["accuracy"] <= error)
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
        named = cell.get(VERDICT, {}).values()
        good = named_well(cell) if named else []
        row["named well"] = f"{sum(good)} of {len(good)}" if named else None
        for title in ("seconds", "verdict seconds"):
            measured = [each[title] for each in named if title in each]
            row[title] = f"{statistics.fmean(measured):.1f}" if measured else None
        lines.append(row)
    return lines


def tables_of(runs: Store) -> dict[str, list[Row]]:
    """Accuracies and the summary of each model, and the regrets of all methods."""
    tables, by_model = {}, {model: cells(runs, model) for model in MODELS}
    by_model = {model: found for model, found in by_model.items() if found}
    all_regrets = {model: regrets(found) for model, found in by_model.items()}
    methods = list(dict.fromkeys(m for found in all_regrets.values() for m in found))
    methods.sort(key=VERDICT.__eq__)  # last
    if by_model:
        tables["Regret"] = [_regret(method, all_regrets) for method in methods]
    for model, found in by_model.items():
        tables[f"Learned weights and the best simple way, {model}"] = summary(found)
        tables[f"Accuracy, {model}"] = [
            {"method": m}
            | {name: f"{accuracy(c[m]):.3f}"[1:] if m in c else None for name, c in found.items()}
            for m in methods
        ]
    return tables


def _regret(method: str, all_regrets: Mapping[str, Mapping[str, list[float]]]) -> Row:
    row: Row = {"method": method}
    for model, found in all_regrets.items():
        each = found.get(method)
        row[f"{model}, mean"] = f"{statistics.fmean(each):.3f}" if each else None
        row[f"{model}, worst"] = f"{max(each):.3f}" if each else None
    return row
