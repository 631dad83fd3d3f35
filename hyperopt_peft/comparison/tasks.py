"""`AcrossTasks`: the comparisons of several tasks as one, whose repetitions are the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from hyperopt_peft.comparison.joined import Joined
from hyperopt_peft.comparison.result import Comparison, Row
from hyperopt_peft.comparison.store import Result, Store
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.errors import ProblemError


class AcrossTasks(Joined):
    """The same methods compared on several tasks.

    A method's score on a task is its mean over the seeds. Seeds of one task share its rows, so that
    differences are paired by task, and intervals are over tasks (Demšar 2006, Statistical
    comparisons of classifiers over multiple data sets, JMLR 7).

    Args:
        comparisons: by the name of the task.

    Raises:
        ProblemError: fewer than two tasks, which have no interval; other methods or ablations,
            another budget, other stopping points, or a score that is better the other way round, on
            one of them.

    Example:
        >>> from hyperopt_peft.comparison.choice import Choice, Plan
        >>> from hyperopt_peft.problems import DoRA, LoRA
        >>> methods, choice = {"LoRA": LoRA(), "DoRA": DoRA()}, Choice([1e-3], [1e-2])
        >>> plan = Plan(methods, choice, [0], "accuracy", False, passes=300)
        >>> def made_up(lora, dora):
        ...     store = Store(None, {})
        ...     for name, score in {"LoRA": lora, "DoRA": dora}.items():
        ...         run = plan.chosen(store, name, "method", 0)
        ...         store.add({**vars(run), "metrics": {"eval_accuracy": score}})
        ...     return Comparison(plan, store)
        >>> joined = AcrossTasks({"questions": made_up(0.8, 0.82), "tweets": made_up(0.7, 0.71)})
        >>> joined.table()[2]
        ['DoRA', '82.0', '71.0', '76.5', '+1.5 ± 6.4']
    """

    unit, key = "tasks", "task"

    def __init__(self, comparisons: Mapping[str, Comparison]) -> None:
        if len(comparisons) < 2:
            raise ProblemError(
                f"comparisons: {len(comparisons)} task has no interval; give two or more"
            )
        name, first = next(iter(comparisons.items()))
        for other, each in comparisons.items():
            plans = each.plan, first.plan
            one, two = ([x.candidates(), x.endings, x.passes, x.lower_is_better] for x in plans)
            if one != two:
                raise ProblemError(
                    f"comparisons: {other} and {name} differ in the methods or ablations, the "
                    "passes or points, or in which scores are better; compare the same on each task"
                )
        metrics = dict.fromkeys(each.metric for each in comparisons.values())
        store = Store(None, first.store.settings)
        super().__init__(replace(first.plan, metric=" or ".join(metrics)), store)
        self.comparisons = dict(comparisons)

    def scores(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[float]:
        """The mean score over seeds, for each task."""
        return [fmean(each.scores(name, kind, stopped)) for each in self.comparisons.values()]

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        """The reported runs of all tasks."""
        every = self.comparisons.values()
        return [run for each in every for run in each.reported(name, kind, stopped)]

    def table(self) -> list[Row]:
        """The mean score on each task, the mean over tasks and the difference to the first."""
        rows = [["method", *self.comparisons, "mean", f"− {self.first}"]]
        for name, kind in self.plan.candidates():
            means = self.scores(name, kind)
            numbers = [self.shown([score]) for score in (*means, fmean(means))]
            rows.append([name + ABLATIONS[kind], *numbers, self._gap(name, kind)])
        return rows

    def _repetitions(self) -> str:
        return f"{len(self.comparisons)} tasks"

    def results(self) -> list[Result]:
        """As `Comparison.results`, of all tasks."""
        return [
            {"task": task, **x} for task, each in self.comparisons.items() for x in each.results()
        ]
