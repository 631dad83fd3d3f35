"""`AcrossBudgets`: the comparisons of the same methods at several budgets."""

from __future__ import annotations

from collections.abc import Mapping
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from hyperopt_peft.comparison.joined import Joined
from hyperopt_peft.comparison.result import Comparison, Row
from hyperopt_peft.comparison.store import Result
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.comparison.tasks import AcrossTasks
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.plots import lines


class AcrossBudgets(Joined):
    """The same methods compared at several budgets: a table of method and budget.

    What its own tables, sentences and picture do not have is that of the largest budget.

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
        ['DoRA', '71.0 ± 0.0*', '83.0 ± 0.0*']
    """

    key, form, lead = "passes", "g", "at {} passes"

    def __init__(self, comparisons: Mapping[float, Comparison]) -> None:
        self.last = last = comparisons[max(comparisons)]
        super().__init__(last.plan, last.store, last.note, last.scored)
        self.comparisons = dict(comparisons)

    @classmethod
    def of_tasks(cls, tasks: Mapping[str, Self]) -> Self:
        """Those of several tasks as one, by `AcrossTasks` at each budget.

        Raises:
            ProblemError: other budgets on one of the tasks; as `AcrossTasks`.
        """
        first, *others = tasks.values()
        if any({*each.comparisons} != {*first.comparisons} for each in others):
            raise ProblemError("tasks: differ in their budgets; compare the same on each task")
        every = ((p, {n: x.comparisons[p] for n, x in tasks.items()}) for p in first.comparisons)
        return cls({passes: AcrossTasks(of_tasks) for passes, of_tasks in every})

    def scores(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[float]:
        """As `Comparison.scores`, at the largest budget."""
        return self.last.scores(name, kind, stopped)

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        """As `Comparison.reported`, at the largest budget."""
        return self.last.reported(name, kind, stopped)

    def table(self) -> list[Row]:
        """The score of each method and ablation at each budget, and where runs may stop before.

        An asterisk marks a significant difference to the first method at the end of the runs.
        """
        every = [(x, end) for x in self.comparisons.values() for end in x.plan.endings]
        rows = [[self._score, *(f"{x.passes:g} passes{', stopped' * end}" for x, end in every)]]
        for name, kind in self.plan.candidates():
            cells = [x.shown(x.scores(name, kind, end)) for x, end in every]
            marks = ["" if end else x.mark(name, kind) for x, end in every]
            rows.append([name + ABLATIONS[kind], *map(add, cells, marks)])
        return rows

    def ablations(self) -> list[Row]:
        """As `Comparison.ablations`, at each budget."""
        return self.stacked("ablations")

    def stopping(self) -> list[Row]:
        """As `Comparison.stopping`, at each budget."""
        return self.stacked("stopping")

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: the mean score against the passes, at the end and when stopped.

        Args:
            path: the file to write too; its suffix, such as ``.pdf`` or ``.png``, is the format.
        """
        panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        scale = 100 if self.in_points else 1
        for end in self.plan.endings:
            panels["stopped where the held-out score was best" if end else "at the end"] = {
                name + ABLATIONS[kind]: (
                    [*self.comparisons],
                    [scale * fmean(x.scores(name, kind, end)) for x in self.comparisons.values()],
                )
                for name, kind in self.plan.candidates()
            }
        ticks = {"xticks": [*self.comparisons], "xticklabels": [f"{x:g}" for x in self.comparisons]}
        return lines(panels, path, xscale="log", **ticks, xlabel="passes", ylabel=self._score)

    def recommendation(self) -> str:
        """As `Comparison.recommendation`, at the largest budget."""
        return f"at {self.passes:g} passes {self.last.recommendation()}"

    def sentences(self) -> list[str]:
        """Those of each comparison, after its budget, and the remarks."""
        found = list[str]()
        for passes, each in self.comparisons.items():
            begin, remarks = f"at {passes:g} passes", each.remarks()
            texts = [text for text in each.sentences() if text not in remarks]
            found += [x if x.startswith(begin) else f"{begin}: {x}" for x in texts]
        return found + self.remarks()

    def results(self) -> list[Result]:
        """The entries of all runs."""
        return self.last.results()

    def _budget(self) -> str:
        return f"{', '.join(f'{passes:g}' for passes in self.comparisons)} passes a run"

    def _repetitions(self) -> str:
        return self.last._repetitions()
