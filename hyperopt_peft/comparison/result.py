"""`Comparison`: the finished runs as tables, sentences and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import pandas  # type: ignore[import-untyped]

from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.store import Result, Store
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.plots import intervals
from hyperopt_peft.utils.tables import aligned
from hyperopt_peft.utils.verdict import Verdict
from hyperopt_peft.utils.versions import versions

Row = list[str]
#: Columns of the table of scores that are not in a paper's.
NOT_PRINTED = ["rate", "upper rate", "seconds", "MB"]


@dataclass
class Comparison:
    """The result of `compare_methods`; printed, the scores with a sentence for each method.

    Attributes:
        plan: the methods, rates and seeds.
        store: the finished runs.
        note: a remark on the rows, or nothing.

    Example:
        >>> from hyperopt_peft.problems import DoRA, LoRA
        >>> from hyperopt_peft.comparison.choice import Choice
        >>> methods, choice = {"LoRA": LoRA(), "DoRA": DoRA()}, Choice([1e-3], [1e-2])
        >>> plan, store = Plan(methods, choice, [0, 1], "accuracy", False, 300), Store(None, {})
        >>> for name, scores in {"LoRA": [0.80, 0.79], "DoRA": [0.82, 0.80]}.items():
        ...     for seed, score in enumerate(scores):
        ...         run = plan.chosen(store, name, "method", seed)
        ...         store.add({**vars(run), "metrics": {"eval_accuracy": score}})
        >>> print(Comparison(plan, store).recommendation())
        DoRA is recommended: its mean accuracy, 0.8100, is the highest of 2; that of LoRA is -0.0150
        from it, with an error of 0.0050
    """

    plan: Plan
    store: Store
    note: str = ""
    #: The repetitions by which differences are paired.
    unit: ClassVar[str] = "seeds"

    @property
    def metric(self) -> str:
        """The name of the score."""
        return self.plan.metric

    @property
    def passes(self) -> float:
        """The budget of each run; 0 of heads, which are solved."""
        return self.plan.passes

    def scores(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[float]:
        """The score of each seed at the end of its run, or where it was best on held-out rows."""
        name_of = f"eval_{self.metric}"
        runs = self.reported(name, kind, stopped)
        return [each["metrics"].get(name_of, math.nan) for each in runs]

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        """The reported runs of a method or an ablation, one for each seed."""
        chosen = (
            self.plan.chosen(self.store, name, kind, seed, stopped) for seed in self.plan.seeds
        )
        return [self.store.results[run] for run in chosen]

    def require_finite(self) -> None:
        """Raise ProblemError where a reported run has no finite score."""
        for name, kind in self.plan.candidates():
            for seed, score in zip(self.plan.seeds, self.scores(name, kind), strict=True):
                if not math.isfinite(score):
                    raise ProblemError(
                        f"{self.plan.chosen(self.store, name, kind, seed)}: the score is "
                        f"{score:g}, by a loss or a metric that is not finite; give lower rates or "
                        "another metric"
                    )

    def recommendation(self) -> str:
        """The method of the best mean score, and how far the next one is behind it.

        On 40 cases a rule that prefers a simpler method within an error was worse.
        """
        sign, word = (1, "lowest") if self.plan.lower_is_better else (-1, "highest")
        best, *rest = sorted(self.plan.methods, key=lambda name: sign * fmean(self.scores(name)))
        text = (
            f"{best} is recommended: its mean {self.metric}, {fmean(self.scores(best)):.4f}, is "
            f"the {word} of {len(self.plan.methods)}"
        )
        for other in rest[:1]:
            gap = self.difference((other, "method"), (best, "method"))
            text += f"; that of {other} is {gap.estimate:+.4f} from it, with an error of "
            text += f"{gap.error:.4f}"
        return text

    def differences(self, one: tuple[str, Kind], other: tuple[str, Kind]) -> list[float]:
        """For each seed, the score of one method or ablation minus the score of the other."""
        pairs = zip(self.scores(*one), self.scores(*other), strict=True)
        return [first - second for first, second in pairs]

    def difference(self, one: tuple[str, Kind], other: tuple[str, Kind]) -> Verdict:
        """The mean of `differences` with its interval."""
        return Verdict(self.differences(one, other))

    def _gap(self, name: str, kind: Kind) -> str:
        """The difference to the first method; nothing for itself."""
        first = self.plan.candidates()[0]
        return "" if (name, kind) == first else str(self.difference((name, kind), first))

    @property
    def first(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.plan.methods))

    def table(self) -> list[Row]:
        """The scores: heads, then a row for each method and each ablation."""
        spent = ["rate", "upper rate", "passes"] if self.passes else []
        rows = [["method", self.metric, f"− {self.first}", *spent, "seconds", "MB"]]
        for name, kind in self.plan.candidates():
            results = self.reported(name, kind)
            means = {"passes": fmean(sum(r["spent"].values()) for r in results)}
            means["seconds"] = fmean(r["seconds"] for r in results)
            spent = [*_rates(results[0]), f"{means['passes']:.1f}"] if self.passes else []
            score = Verdict(self.scores(name, kind)).shown()
            memory = f"{max(r['memory'] for r in results):.0f}"
            cells = [score, self._gap(name, kind), *spent, f"{means['seconds']:.1f}", memory]
            rows.append([name + ABLATIONS[kind], *cells])
        return rows

    def rates(self) -> list[Row]:
        """The mean score on held-out rows at each rate; an asterisk marks the chosen one."""
        rows = [["method", "rate", "upper rate", self.metric]]
        for name, kind in self.plan.candidates():
            best = self.plan.chosen(self.store, name, kind, self.plan.seeds[0])
            for run, score in self.plan.at_every_rate(self.store, name, kind):
                mark = " *" if (run.rate, run.upper_rate) == (best.rate, best.upper_rate) else ""
                rows.append([name + ABLATIONS[kind], *_rates(vars(run)), f"{score:.4f}{mark}"])
        return rows

    def sentences(self) -> list[str]:
        """For each method the difference to the first one, its parts, and remarks."""
        lines = []
        ablated = {name for name, kind in self.plan.candidates() if kind == "frozen"}
        for name in self.plan.methods:
            if name != self.first:
                gap = self.difference((name, "method"), (self.first, "method"))
                names = name, self.first, self.metric, self.unit
                lines.append(gap.sentence(*names, self.plan.lower_is_better))
            if name in ablated:
                lines.append(self._by_parts(name))
        return lines + self.remarks()

    def _by_parts(self, name: str) -> str:
        """The difference to the first method as a sum over the ablations between the two."""
        kinds = [each for each in self.plan.candidates() if each[0] == name]
        parts = ["the upper level", "the split of the rows, fewer steps and the rate"]
        if name != self.first:
            kinds.append((self.first, "method"))
            parts.append("the variables, the adapter and the rate")
            if (name, "one level") not in kinds:
                parts[1:] = ["the split of the rows, fewer steps, the adapter and the rate"]
        terms = []
        for part, one, other in zip(parts, kinds[:-1], kinds[1:]):
            gap = self.difference(one, other)
            terms.append(f"{gap} by {part}" + ", not significant" * (not gap.is_significant))
        last = self.first if name != self.first else f"the same{ABLATIONS[kinds[-1][1]]}"
        return "\n  ".join([f"{name} − {last} is the sum of", *terms])

    def _edges(self) -> Iterator[str]:
        """Rates without a finite score, and chosen rates at an end of their grid."""
        plan = self.plan
        for name, kind in plan.candidates():
            title = name + ABLATIONS[kind]
            best = plan.chosen(self.store, name, kind, plan.seeds[0])
            for run, score in plan.at_every_rate(self.store, name, kind):
                if not math.isfinite(score):
                    rates = " and upper rate ".join(filter(None, _rates(vars(run))))
                    text = f"at the rate {rates} a score is not finite, which counts as the worst"
                    yield f"{title}: {text}"
            chosen = (
                ("rate", best.rate, plan.choice.rates),
                ("upper rate", best.upper_rate, plan.choice.upper_rates),
            )
            for word, rate, grid in chosen:
                if kind != "frozen" and len(grid) > 1 and rate in (min(grid), max(grid)):
                    text = f"is at the edge of the {word}s; give further ones"
                    yield f"{title}: the best {word}, {rate:g}, {text}"

    def remarks(self) -> list[str]:
        """Remarks on rates, rows and runs."""
        lines, layers = (
            [*filter(None, [self.note, self.store.remark(), *self._edges()])],
            dict[str, list[str]](),
        )
        for name, method in self.plan.methods.items():
            if method.absorbed:
                lines.append(
                    f"{name}: a lower level at its minimum absorbs the upper variables; what moves "
                    "them is the path to it or the decay of an optimizer"
                )
            if text := self.reported(name)[0]["layers"]:
                layers.setdefault(text, []).append(name)
        alike = len(layers) == 1
        return lines + [k if alike else f"{', '.join(names)}: {k}" for k, names in layers.items()]

    def spent(self) -> list[Row]:
        """The passes of each method, by use; means over seeds."""
        rows: list[Row] = []
        for name, kind in self.plan.candidates():
            results = self.reported(name, kind)
            means = {key: fmean(r["spent"][key] for r in results) for key in results[0]["spent"]}
            rows = rows or [["method", *means]]
            rows.append([name + ABLATIONS[kind], *(f"{x:.1f}" for x in means.values())])
        return rows

    def tables(self) -> dict[str, list[Row]]:
        """All tables by heading; rates and passes only where runs have a budget."""
        if not self.passes:
            return {"Scores": self.table()}
        others = {"Held-out score at every rate": self.rates(), "Passes": self.spent()}
        return {"Scores": self.table(), **others}

    def heading(self) -> str:
        """The score, the rows, the budget and the number of seeds, in a line."""
        rows = "folds of the trusted rows" if self.store.shared.get("folds") else "the test rows"
        better = " (lower is better)" if self.plan.lower_is_better else ""
        passes = f"{self.passes:g} passes a run" if self.passes else "heads at their minimum"
        return (
            f"{self.metric}{better} on {rows}, {passes}, means of {len(self.plan.seeds)} seeds "
            "with 95 % intervals"
        )

    def __str__(self) -> str:
        return "\n".join([self.heading(), "", aligned(self.table()), "", *self.sentences()])

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: the differences to the first method with their intervals.

        Args:
            path: the file to write too; its suffix, such as ``.pdf`` or ``.png``, is the format.
        """
        first, *others = self.plan.candidates()
        gaps = {}
        for name, kind in others:
            gap = self.difference((name, kind), first)
            gaps[name + ABLATIONS[kind]] = (gap.estimate, *gap.interval)
        title = f"{self.metric} − that of {self.first}, paired, 95 % intervals"
        return intervals(gaps, path, title)

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages with which the runs were done."""
        return dict(self.store.shared.get("versions") or versions())

    def to_latex(self) -> str:
        """The scores, differences and passes as a LaTeX table of the package booktabs.

        The heading and the versions are comments above the table.
        """
        notes = self.heading(), ", ".join(map(" ".join, self.versions.items()))
        heads, *rows = self.table()
        table = pandas.DataFrame(rows, columns=heads).drop(columns=NOT_PRINTED, errors="ignore")
        form = "l" + "r" * (table.shape[1] - 1)
        text = table.to_latex(index=False, escape=True, column_format=form)
        for sign, command in {"±": r"$\pm$", "−": "$-$", "–": "--"}.items():
            text = text.replace(sign, command)
        return "\n".join([*(f"% {note}" for note in notes), text])

    def results(self) -> list[Result]:
        """The entries of all runs."""
        return [*self.store.results.values()]

    def to_csv(self, path: str | Path) -> None:
        """Write all runs, one line each, with columns such as ``metrics.eval_loss``."""
        pandas.json_normalize(self.results()).to_csv(path, index=False)


def _rates(run: Mapping[str, Any]) -> Row:
    """The rate and the upper rate of a run."""
    upper = run["upper_rate"]
    return [f"{run['rate']:g}", "" if upper is None else f"{upper:g}"]
