"""`Comparison`: the finished runs as numbers, sentences and a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]

from hyperopt_peft.comparison import sentences, tables
from hyperopt_peft.comparison.choice import AXES, Plan
from hyperopt_peft.comparison.store import OF_SEED, Result, Store
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.plots import intervals
from hyperopt_peft.utils.tables import aligned
from hyperopt_peft.utils.verdict import Verdict, holm

#: A method or one of its ablations.
Candidate = tuple[str, Kind]
#: The columns of `Comparison.differences`.
DIFFERENCES = ["method", "minus", "estimate", "half_width", "p_value", "corrected"]
DIFFERENCES += ["significant", "detectable", "freedom"]


@dataclass
class Comparison:
    """The result of `compare_methods`; printed, the scores with a sentence for each method.

    `scores`, `table`, `differences`, `rates` and `runs` are pandas DataFrames of plain numbers.
    In print, scores up to 1 that are better where they are higher, such as accuracy, F1 and
    Matthews' correlation, are in points: hundredths, with one decimal.

    Attributes:
        plan: the methods, rates and seeds.
        store: the finished runs.
        note: a remark on the rows, or nothing.
        scored: the number of test rows, or of rows divided into folds; 0 if unknown.

    Example:
        >>> from hyperopt_peft.problems import DoRA, LoRA
        >>> from hyperopt_peft.comparison.choice import Choice
        >>> methods, choice = {"LoRA": LoRA(), "DoRA": DoRA()}, Choice([1e-3], [1e-2])
        >>> plan, store = Plan(methods, choice, [0, 1], "accuracy", False, 300), Store(None, {})
        >>> for name, scores in {"LoRA": [0.80, 0.79], "DoRA": [0.82, 0.80]}.items():
        ...     for seed, score in enumerate(scores):
        ...         run = plan.chosen(store, name, "method", seed)
        ...         store.add({**vars(run), "metrics": {"eval_accuracy": score}})
        >>> comparison = Comparison(plan, store)
        >>> comparison.scores().mean().round(3).to_dict()
        {'LoRA': 0.795, 'DoRA': 0.81}
        >>> print(comparison.recommendation())
        the mean accuracy of DoRA, 81.0 points, is the highest of 2; no significant difference \
between DoRA and LoRA in accuracy (+1.5 ± 6.4 points); minimum detectable difference with 2 seeds \
(80 % power): 19.6 points
    """

    plan: Plan
    store: Store
    note: str = ""
    scored: int = 0
    _reported: dict[Any, list[Result]] = field(default_factory=dict, init=False, repr=False)

    @property
    def first(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.plan.methods))

    @staticmethod
    def title(name: str, kind: Kind) -> str:
        """The name of a method or an ablation in tables."""
        return name + ABLATIONS[kind]

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        """The entries of the reported runs of a method or an ablation, one for each seed."""
        candidate = name, kind, stopped
        if candidate not in self._reported:
            runs = [self.plan.chosen(self.store, name, kind, x, stopped) for x in self.plan.seeds]
            self._reported[candidate] = [self.store.results[run] for run in runs]
        return self._reported[candidate]

    def scores(self, stopped: bool = False) -> Any:
        """The scores: a row for each seed, a column for each method and ablation.

        Args:
            stopped: those of runs that end at the point that was best on held-out rows, which are
                others if the choice has several ``points``.
        """
        key = f"eval_{self.plan.metric}"
        columns = {
            self.title(*each): [
                run["metrics"].get(key, math.nan) for run in self.reported(*each, stopped)
            ]
            for each in self.plan.candidates()
        }
        return pandas.DataFrame(columns, index=self.plan.seeds, dtype=float).rename_axis("seed")

    def table(self) -> Any:
        """What each method and ablation reached and took, one row each.

        Columns:
            - ``mean``, ``half_width``: the score, and half the width of its 95 % interval.
            - ``stopped``, ``stopped_half_width``, ``stopped_passes``: those of runs that stop at
              their best point, if the choice has points, and the median of their passes.
            - ``rate``, ``upper_rate``: the medians of the chosen ones.
            - ``passes``: a run's, and those by use, such as ``spent.upper steps``;
              ``passes_of_choice``: those of the runs by which a seed chooses.
            - ``seconds`` of a run, and its peak ``memory`` in MB.
            - ``upper.hypergradient``, ``upper.lower_steps``, ``upper.steps``: the estimator and the
              steps of the upper level. ``upper.moved`` is how far its variables u moved,
              ‖u − u0‖/‖u0‖, or ‖u‖ if ``upper.start``, ‖u0‖, is 0; ``upper.moved_in_rates`` is the
              mean ``|u − u0|`` in units of their rate.
        """
        rows = {}
        *choosing, _ = self.plan.stages(self.store)
        for candidate in self.plan.candidates():
            runs = pandas.json_normalize(self.reported(*candidate))
            row = self._mean(candidate)
            if len(self.plan.endings) > 1:
                ends = pandas.json_normalize(self.reported(*candidate, stopped=True))
                stopped = self._mean(candidate, stopped=True)
                row.update(stopped=stopped["mean"], stopped_half_width=stopped["half_width"])
                row["stopped_passes"] = ends.filter(like="spent.").sum(axis=1).median()
            if self.plan.passes:
                row.update(runs[[*AXES]].astype(float).median())
                row["passes"] = runs.filter(like="spent.").sum(axis=1).mean()
                every = {run for stage in choosing for run in stage}  # stages share some
                tried = [run for run in every if (run.method, run.kind) == candidate]
                passes = sum(sum(self.store.results[run]["spent"].values()) for run in tried)
                row["passes_of_choice"] = passes / len(self.plan.seeds)
            did = runs.filter(regex=r"^spent\.|^upper\.|^seconds$")
            settings = did.select_dtypes(exclude="number").iloc[0].dropna()
            numbers = did.select_dtypes("number").replace(math.inf, math.nan).mean().dropna()
            row["memory"] = runs["memory"].max()
            rows[self.title(*candidate)] = {**row, **numbers, **settings}
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    def _mean(self, candidate: Candidate, stopped: bool = False) -> dict[str, Any]:
        """The mean score, and half the width of its interval."""
        found = self.mean(candidate, stopped)
        return {"mean": found.estimate, "half_width": found.half}

    def differences(self) -> Any:
        """The paired differences of scores: a row for each pair, ``method`` minus ``minus``.

        Each method and ablation is compared with the first method, and each form of a method with
        the next simpler one. Two families are tested, the differences of methods to the first one
        and the effects that these are the sum of: ``corrected`` is the p-value by Holm's correction
        in the pair's family, NaN in neither, and ``significant`` where it is below 0.05.
        ``detectable`` is the minimum detectable difference, at a power of 80 %; ``freedom`` are the
        degrees of freedom of the interval.
        """
        rows = []
        for (one, other), gap in self.verdicts.items():
            numbers = [gap.estimate, gap.half, gap.p_value, gap.corrected, gap.is_significant]
            rows.append(
                [self.title(*one), self.title(*other), *numbers, gap.detectable, gap.freedom]
            )
        return pandas.DataFrame(rows, columns=DIFFERENCES).set_index(["method", "minus"])

    def rates(self) -> Any:
        """The mean held-out score at each rate, and the number of seeds that chose it.

        A row is of a ``rate`` or of an ``upper_rate``; upper rates are at each seed's own rate.
        """
        rows = []
        for name, kind in self.plan.candidates():
            for axis, rate, mean in self.plan.at_every_rate(self.store, name, kind):
                seeds = sum(run[axis] == rate for run in self.reported(name, kind))
                title = self.title(name, kind)
                rows.append({"method": title, axis: rate, "mean": mean, "seeds": seeds})
        columns = ["method", *AXES, "mean", "seeds"]
        return pandas.DataFrame(rows, columns=columns).astype(dict.fromkeys(AXES, float))

    def runs(self) -> Any:
        """All runs, one row each, with columns such as ``metrics.eval_loss``."""
        return pandas.json_normalize([*self.store.results.values()])

    def tables(self) -> dict[str, Any]:
        """All tables of a report by heading: DataFrames of texts, with intervals and signs."""
        return tables.every(self)

    def require_finite(self) -> None:
        """Raise ProblemError where a reported run has no finite score."""
        for name, kind in self.plan.candidates():
            for seed, score in self.scores()[self.title(name, kind)].items():
                if not math.isfinite(score):
                    raise ProblemError(
                        f"{self.plan.chosen(self.store, name, kind, seed)}: the score is "
                        f"{score:g}, by a loss or a metric that is not finite; give lower rates or "
                        "another metric"
                    )

    @cached_property
    def in_points(self) -> bool:
        """Whether scores are shown in points."""
        return not self.plan.lower_is_better and bool((self.scores().abs() <= 1).all(axis=None))

    @cached_property
    def over_rows(self) -> bool:
        """Whether the intervals are over test rows, too, which all seeds share."""
        return all(self.influence(each) is not None for each in self.plan.candidates())

    def influence(self, candidate: Candidate, stopped: bool = False) -> Any:
        """How far each part of the test rows moves each seed's score; None where it is unknown.

        An array of shape (seeds, parts), as `Verdict` has it. It is unknown where seeds have test
        rows of their own, as with folds, and of a metric without a value on a part of the rows.
        """
        shared, key = self.store.shared, f"eval_{self.plan.metric}"
        if shared.get("folds") or shared.get("test_dataset") == OF_SEED:
            return None
        found = [run.get("influence", {}).get(key) for run in self.reported(*candidate, stopped)]
        same = len({len(each) if each else 0 for each in found}) == 1
        return np.array(found) if found[0] and same else None

    @property
    def score_name(self) -> str:
        """The metric, and its unit if it is in points."""
        return f"{self.plan.metric} (points)" if self.in_points else self.plan.metric

    def shown(self, score: float) -> str:
        """A score in points or digits."""
        return Verdict([score], self.in_points).shown()

    def mean(self, candidate: Candidate, stopped: bool = False) -> Verdict:
        """The mean score of a method or an ablation, with its interval."""
        scores = self.scores(stopped)[self.title(*candidate)]
        return Verdict(scores, self.in_points, self.influence(candidate, stopped))

    def difference(self, one: Candidate, other: Candidate) -> Verdict:
        """The mean difference of two methods or ablations, paired by seed, with its interval."""
        scores = self.scores()
        gaps = scores[self.title(*one)] - scores[self.title(*other)]
        moved = self.influence(one), self.influence(other)
        known = all(x is not None for x in moved) and moved[0].shape == moved[1].shape
        return Verdict(gaps, self.in_points, moved[0] - moved[1] if known else None)

    @cached_property
    def verdicts(self) -> dict[tuple[Candidate, Candidate], Verdict]:
        """The differences of `differences`, of which two families are corrected by `holm`."""
        first, *others = self.plan.candidates()
        found = {(each, first): self.difference(each, first) for each in others}
        for gap in found.values():
            gap.corrected = math.nan
        methods = [(each, first) for each in others if each[1] == "method"]
        effects = [pair for name in self.plan.methods for pair in pairwise(self.forms(name))]
        for pairs in methods, effects:
            family = {pair: self.difference(*pair) for pair in pairs}
            p_values = holm(each.p_value for each in family.values())
            for verdict, p_value in zip(family.values(), p_values, strict=True):
                verdict.corrected = p_value
                verdict.family = len(family)
            found.update(family)
        return found

    def forms(self, name: str) -> list[Candidate]:
        """A method, its ablations and the first method; nothing without ablations."""
        every = self.plan.candidates()
        forms = [each for each in every if each[0] == name]
        if len(forms) == 1:
            return []
        return forms if name == self.first else [*forms, every[0]]

    def recommendation(self) -> str:
        """The method with the best mean score, recommended if it is better than the next one."""
        return sentences.recommendation(self)

    def sentences(self) -> list[str]:
        """For each method the difference to the first one, its effects, and remarks."""
        return sentences.sentences(self)

    def remarks(self) -> list[str]:
        """Remarks on rows, seeds, rates and layers."""
        return sentences.remarks(self)

    def heading(self) -> str:
        """The score, the rows, the budget, what the intervals are over, and the significance."""
        return sentences.heading(self)

    def __str__(self) -> str:
        table = aligned(tables.rows_of(tables.scores(self)))
        return "\n".join([self.heading(), "", table, "", *self.sentences()])

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: the differences to the first method with their intervals.

        Args:
            path: the file to write too; its suffix, such as ``.pdf`` or ``.png``, is the format.
        """
        scale = 100 if self.in_points else 1
        gaps = {}
        for (one, other), gap in self.verdicts.items():
            low, high = gap.interval
            if other == self.plan.candidates()[0]:
                gaps[self.title(*one)] = (scale * gap.estimate, scale * low, scale * high)
        title = f"{self.score_name} − that of {self.first}, paired, 95 % intervals"
        return intervals(gaps, path, title)
