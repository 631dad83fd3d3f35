"""`AcrossBudgets`: the comparisons of the same methods at several budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from hyperopt_peft.comparison.result import Comparison, Row
from hyperopt_peft.comparison.store import Result
from hyperopt_peft.comparison.task import ABLATIONS
from hyperopt_peft.comparison.tasks import AcrossTasks
from hyperopt_peft.utils.plots import lines
from hyperopt_peft.utils.tables import aligned


@dataclass
class AcrossBudgets:
    """The same methods compared at several budgets; printed, a table of method and budget.

    Attributes:
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

    comparisons: Mapping[float, Comparison]

    @classmethod
    def of_tasks(cls, tasks: Mapping[str, Self]) -> Self:
        """Those of several tasks as one, by `AcrossTasks` at each budget."""
        first = next(iter(tasks.values()))
        return cls(
            {
                passes: AcrossTasks({name: x.comparisons[passes] for name, x in tasks.items()})
                for passes in first.comparisons
            }
        )

    @property
    def columns(self) -> dict[str, tuple[Comparison, bool]]:
        """The comparison at each budget, at the ends of runs and where they may stop before."""
        return {
            f"{passes:g}{', stopped' * stopped}": (each, stopped)
            for passes, each in self.comparisons.items()
            for stopped in each.plan.endings
        }

    def table(self) -> list[Row]:
        """The score of each method and ablation at each budget."""
        first = next(iter(self.comparisons.values()))
        rows = [[first.metric, *(f"{head} passes" for head in self.columns)]]
        for pair in first.plan.candidates():
            cells = [x.shown(x.scores(*pair, end)) for x, end in self.columns.values()]
            rows.append([pair[0] + ABLATIONS[pair[1]], *cells])
        return rows

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: the mean score against the passes, at the end and when stopped.

        Args:
            path: the file to write too; its suffix, such as ``.pdf`` or ``.png``, is the format.
        """
        every = [*self.comparisons.values()]
        panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for stopped in every[0].plan.endings:
            title = "stopped where the held-out score was best" if stopped else "at the end"
            panels[title] = {
                name + ABLATIONS[kind]: (
                    [*self.comparisons],
                    [fmean(each.scores(name, kind, stopped)) for each in every],
                )
                for name, kind in every[0].plan.candidates()
            }
        return lines(panels, path, xscale="log", xlabel="passes", ylabel=every[0].metric)

    def sentences(self) -> list[str]:
        """Those of each comparison, after its budget."""
        return [
            f"{passes:g} passes: {sentence}"
            for passes, each in self.comparisons.items()
            for sentence in each.sentences()
        ]

    def tables(self) -> dict[str, list[Row]]:
        """The table of budgets, and all tables of each comparison."""
        return {"Budgets": self.table()} | {
            f"{title}, {passes:g} passes": rows
            for passes, each in self.comparisons.items()
            for title, rows in each.tables().items()
        }

    def results(self) -> list[Result]:
        """The entries of all runs."""
        return next(iter(self.comparisons.values())).results()

    def __str__(self) -> str:
        return "\n".join([aligned(self.table()), "", *self.sentences()])
