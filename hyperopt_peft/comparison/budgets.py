"""`AcrossBudgets`: the comparisons of the same methods at several budgets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from hyperopt_peft.comparison.result import Comparison, Row
from hyperopt_peft.comparison.store import Result
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.comparison.tasks import AcrossTasks
from hyperopt_peft.utils.plots import lines


class AcrossBudgets(Comparison):
    """The same methods compared at several budgets; printed, a table of method and budget.

    Where one budget is asked for, as by ``scores``, it is the largest.

    Args:
        comparisons: by the passes of a run.

    Example:
        >>> from hyperopt_peft.comparison.choice import Choice, Plan
        >>> from hyperopt_peft.comparison.store import Store
        >>> from hyperopt_peft.problems import DoRA, LoRA
        >>> methods, choice = {"LoRA": LoRA(), "DoRA": DoRA()}, Choice([1e-3], [1e-2])
        >>> def made_up(passes, *scores):
        ...     plan = Plan(methods, choice, [0, 1], "accuracy", False, passes)
        ...     store = Store(None, {})
        ...     for name, score in zip(methods, scores):
        ...         for seed in plan.seeds:
        ...             run = plan.chosen(store, name, "method", seed)
        ...             store.add({**vars(run), "metrics": {"eval_accuracy": score}, "spent": {}})
        ...     return Comparison(plan, store)
        >>> budgets = AcrossBudgets({300: made_up(300, 0.7, 0.71), 1200: made_up(1200, 0.8, 0.83)})
        >>> budgets.table()[2]
        ['DoRA', '71.0 ± 0.0', '83.0 ± 0.0']
    """

    def __init__(self, comparisons: Mapping[float, Comparison]) -> None:
        self.last = last = comparisons[max(comparisons)]
        super().__init__(last.plan, last.store, last.note, last.scored)
        self.comparisons = dict(sorted(comparisons.items()))

    @classmethod
    def of_tasks(cls, tasks: Mapping[str, Self]) -> Self:
        """Those of several tasks as one, by `AcrossTasks` at each budget."""
        budgets = next(iter(tasks.values())).comparisons
        every = ((b, {name: x.comparisons[b] for name, x in tasks.items()}) for b in budgets)
        return cls({passes: AcrossTasks(of_tasks) for passes, of_tasks in every})

    def scores(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[float]:
        """As `Comparison.scores`, at the largest budget."""
        return self.last.scores(name, kind, stopped)

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        """As `Comparison.reported`, at the largest budget."""
        return self.last.reported(name, kind, stopped)

    def table(self) -> list[Row]:
        """The score of each method and ablation at each budget, and where runs may stop before."""
        columns = {
            f"{passes:g} passes{', stopped' * stopped}": (each, stopped)
            for passes, each in self.comparisons.items()
            for stopped in self.plan.endings
        }
        return [["method", *columns]] + [
            [
                name + ABLATIONS[kind],
                *(x.shown(x.scores(name, kind, y)) for x, y in columns.values()),
            ]
            for name, kind in self.plan.candidates()
        ]

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: the mean score against the passes, at the end and when stopped.

        Args:
            path: the file to write too; its suffix, such as ``.pdf`` or ``.png``, is the format.
        """
        scale = 100 if self.in_points else 1
        panels = {
            "stopped where the held-out score was best" if stopped else "at the end": {
                name + ABLATIONS[kind]: (
                    [*self.comparisons],
                    [
                        scale * fmean(x.scores(name, kind, stopped))
                        for x in self.comparisons.values()
                    ],
                )
                for name, kind in self.plan.candidates()
            }
            for stopped in self.plan.endings
        }
        return lines(panels, path, xscale="log", xlabel="passes", ylabel=self.score_name)

    def sentences(self) -> list[str]:
        """Those of each comparison, after its budget."""
        found = [(passes, each.sentences()) for passes, each in self.comparisons.items()]
        return [f"{passes:g} passes: {text}" for passes, texts in found for text in texts]

    def tables(self) -> dict[str, list[Row]]:
        """The table of budgets, and all tables of each comparison."""
        return {"Budgets": self.table()} | {
            f"{title}, {passes:g} passes": rows
            for passes, each in self.comparisons.items()
            for title, rows in each.tables().items()
        }

    def heading(self) -> str:
        """As `Comparison.heading`, of the largest budget."""
        return f"{self.last.heading()}; smaller budgets beside it"

    def results(self) -> list[Result]:
        """As `Comparison.results`, of all budgets."""
        return self.last.results()
