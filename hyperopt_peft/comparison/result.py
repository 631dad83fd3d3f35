"""`Comparison`: the finished runs as tables, sentences and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from operator import methodcaller
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import pandas  # type: ignore[import-untyped]

from hyperopt_peft.comparison.choice import AXES, Plan
from hyperopt_peft.comparison.search import best_of
from hyperopt_peft.comparison.store import Result, Store
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.trainer.method import has_upper_level
from hyperopt_peft.utils.plots import intervals
from hyperopt_peft.utils.tables import aligned
from hyperopt_peft.utils.verdict import Verdict, holm
from hyperopt_peft.utils.versions import versions

Row = list[str]
#: A method or one of its ablations.
Candidate = tuple[str, Kind]
#: Columns of the table of scores that are not in a paper's.
NOT_PRINTED = ["rate", "upper rate", "seconds", "MB"]
#: The columns of the table of upper levels, by the entries of a run.
UPPER = {"steps": "upper steps", "moved": "moved, relative", "moved_in_rates": "moved, in rates"}
UPPER |= {"implicit_ratio": "implicit ratio", "residual": "residual"}
#: Those that are settings.
USED = {"hypergradient": "estimator", "lower_steps": "lower steps"}
#: What differs between a method's form, its next simpler one, and the first method.
EFFECTS: dict[tuple[Kind, Kind], str] = {
    ("method", "frozen"): "the upper level",
    ("method", "one level"): "the upper level, the data split, fewer lower steps and the rate",
    ("frozen", "one level"): "the data split, fewer lower steps and the rate",
    ("frozen", "method"): "the data split, fewer lower steps, the adapter and the rate",
    ("one level", "method"): "the variables, the adapter and the rate",
}
#: The characters that are others in LaTeX.
LATEX = str.maketrans({sign: f"\\{sign}" for sign in "&%$#_{}"})
LATEX |= str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"})
LATEX |= str.maketrans({"±": r"$\pm$", "−": "$-$", "–": "--", "*": "$^*$"})


@dataclass
class Comparison:
    """The result of `compare_methods`; printed, the scores with a sentence for each method.

    Scores up to 1 that are better where they are higher, such as accuracy, F1 and Matthews'
    correlation, are shown in points: hundredths, with one decimal.

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
        >>> print(Comparison(plan, store).recommendation())
        DoRA is recommended: its mean accuracy, 81.0 points, is the highest of 2; no significant \
difference between DoRA and LoRA in accuracy (+1.5 ± 6.4 points); minimum detectable difference \
with 2 seeds (80 % power): 8.2 points
    """

    plan: Plan
    store: Store
    note: str = ""
    scored: int = 0
    _reported: dict[Any, list[Result]] = field(default_factory=dict, init=False, repr=False)
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
        runs, key = self.reported(name, kind, stopped), f"eval_{self.metric}"
        return [run["metrics"].get(key, math.nan) for run in runs]

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        """The reported runs of a method or an ablation, one for each seed."""
        if (candidate := (name, kind, stopped)) not in self._reported:
            pick = partial(self.plan.chosen, self.store, name, kind, stopped=stopped)
            self._reported[candidate] = [self.store.results[pick(x)] for x in self.plan.seeds]
        return self._reported[candidate]

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

    @cached_property
    def in_points(self) -> bool:
        """Whether scores are shown in points."""
        scores = (score for each in self.plan.candidates() for score in self.scores(*each))
        return not self.plan.lower_is_better and all(abs(score) <= 1 for score in scores)

    def recommendation(self) -> str:
        """The method of the best mean score, and its difference to the next one."""
        lower = self.plan.lower_is_better
        sign, word = (1, "lowest") if lower else (-1, "highest")
        best, *rest = sorted(self.plan.methods, key=lambda name: sign * fmean(self.scores(name)))
        mean = self.shown([fmean(self.scores(best))]) + " points" * self.in_points
        text = (
            f"{best} is recommended: its mean {self.metric}, {mean}, is the {word} of "
            f"{len(self.plan.methods)}"
        )
        for other in rest[:1]:
            gap = self.difference((best, "method"), (other, "method"))
            text += f"; {gap.sentence(best, other, self.metric, self.unit, lower)}"
        return text

    def shown(self, scores: Sequence[float]) -> str:
        """The mean of ``scores`` with its interval, in points or digits."""
        return Verdict(scores, self.in_points).shown()

    def differences(self, one: Candidate, other: Candidate) -> list[float]:
        """For each seed, the score of one method or ablation minus the score of the other."""
        pairs = zip(self.scores(*one), self.scores(*other), strict=True)
        return [first - second for first, second in pairs]

    def difference(self, one: Candidate, other: Candidate) -> Verdict:
        """The mean of `differences` with its interval."""
        return Verdict(self.differences(one, other), self.in_points)

    @cached_property
    def verdicts(self) -> dict[tuple[Candidate, Candidate], Verdict]:
        """The differences that `sentences` state, corrected in two families by `holm`.

        One has the difference of each method to the first one, the other has the parts of these.
        """
        first, *others = [each for each in self.plan.candidates() if each[1] == "method"]
        parts = [pair for name in self.plan.methods for pair in pairwise(self._forms(name))]
        found = dict[tuple[Candidate, Candidate], Verdict]()
        for pairs in [(other, first) for other in others], parts:
            family = {pair: self.difference(*pair) for pair in pairs}
            p_values = holm(each.p_value for each in family.values())
            for verdict, p_value in zip(family.values(), p_values, strict=True):
                verdict.corrected, verdict.family = p_value, len(family)
            found |= family
        return found

    def _forms(self, name: str) -> list[Candidate]:
        """A method, its ablations and the first method; nothing without ablations."""
        every = self.plan.candidates()
        forms = [each for each in every if each[0] == name]
        return forms + every[: name != self.first] if len(forms) > 1 else []

    def mark(self, name: str, kind: Kind) -> str:
        """An asterisk where the difference to the first method is significant."""
        gap = self.verdicts.get(((name, kind), self.plan.candidates()[0]))
        return "*" * (gap is not None and gap.is_significant)

    def _gap(self, name: str, kind: Kind) -> str:
        """The difference to the first method; nothing for itself."""
        one, first = (name, kind), self.plan.candidates()[0]
        return "" if one == first else f"{self.difference(one, first)}{self.mark(name, kind)}"

    @property
    def first(self) -> str:
        """The method that the others are compared with."""
        return next(iter(self.plan.methods))

    @property
    def _score(self) -> str:
        return f"{self.metric} (points)" if self.in_points else self.metric

    def table(self) -> list[Row]:
        """The scores: heads, then a row for each method and each ablation."""
        spent = ["rate", "upper rate", "passes"] if self.passes else []
        rows = [["method", self._score, f"− {self.first}", *spent, "seconds", "MB"]]
        for name, kind in self.plan.candidates():
            results = self.reported(name, kind)
            passes = f"{fmean(sum(r['spent'].values()) for r in results):.1f}"
            spent = [*(_several(r[x] for r in results) for x in AXES), passes] * bool(self.passes)
            price = f"{fmean(r['seconds'] for r in results):.1f}"
            memory = f"{max(r['memory'] for r in results):.0f}"
            cells = [self.shown(self.scores(name, kind)), self._gap(name, kind), *spent]
            rows.append([name + ABLATIONS[kind], *cells, price, memory])
        return rows

    def ablations(self) -> list[Row]:
        """For each method with ablations, the scores of its forms and the effects between them.

        An effect is the row above minus the row; those of a method sum up to its difference to the
        first one, whose row is the last.
        """
        rows = [["method", self._score, "effect"]]
        for name in self.plan.methods:
            forms = self._forms(name)
            effects = ["", *(_marked(self.verdicts[pair]) for pair in pairwise(forms))]
            for (form, kind), effect in zip(forms, effects):
                score = self.shown(self.scores(form, kind))
                rows.append([form + ABLATIONS[kind], score, effect])
        return rows

    def rates(self) -> list[Row]:
        """The mean held-out score at each rate, and the number of seeds that chose it.

        Without a rate, it is that at each seed's own rate.
        """
        rows = [["method", "rate", "upper rate", self._score, "seeds"]]
        for name, kind in self.plan.candidates():
            for axis, grid in self.plan.at_every_rate(self.store, name, kind).items():
                chosen = [run[axis] for run in self.reported(name, kind)]
                for rate, score in grid.items():
                    pair = [f"{rate:g}", ""] if axis == "rate" else ["", f"{rate:g}"]
                    cells = [*pair, self.shown([score]), str(chosen.count(rate))]
                    rows.append([name + ABLATIONS[kind], *cells])
        return rows

    def upper_level(self) -> list[Row]:
        """The estimator of each upper level, and what it did: means over seeds.

        How far the upper variables u moved is ‖u − u0‖/‖u0‖, or ‖u‖ from u0 = 0, and the mean
        ``|u − u0|`` in units of their rate.
        """
        rows = [["method", *USED.values(), *UPPER.values()]]
        for name, method in self.plan.methods.items():
            if has_upper_level(method):
                used, means = self.reported(name)[0].get("upper") or {}, self._upper(name)
                shown = {key: f"{mean:.3g}" for key, mean in means.items()}
                if means.get("start") == 0 and "moved" in shown:
                    shown["moved"] += " from 0"
                cells = [str(used.get(x, "–")) for x in USED] + [shown.get(x, "–") for x in UPPER]
                rows.append([name, *cells])
        return rows

    def _upper(self, name: str) -> dict[str, float]:
        """Means over seeds of what a method's upper level did, of the entries that are finite."""
        entries = [result.get("upper") or {} for result in self.reported(name)]
        table = pandas.DataFrame(entries, columns=["start", *UPPER], dtype=float)
        means = table.replace(math.inf, math.nan).mean()
        return dict(means.dropna())

    def sentences(self) -> list[str]:
        """For each method the difference to the first one, its parts, and remarks."""
        lines, first, points = [], self.plan.candidates()[0], " points" * self.in_points
        for name in self.plan.methods:
            begin, forms = self._steps(name), self._forms(name)
            if name != self.first:
                names = name, self.first, self.metric, self.unit, self.plan.lower_is_better
                lines.append(begin + self.verdicts[(name, "method"), first].sentence(*names))
                begin, last = "", self.first
            elif forms:
                last = f"the same{ABLATIONS[forms[-1][1]]}"
            terms = [f"{begin}{name} − {last} is the sum of"] if forms else []
            for one, other in pairwise(forms):
                gap, effect = self.verdicts[one, other], EFFECTS[one[1], other[1]]
                shown = f"{gap}{points}{', not significant' * (not gap.is_significant)}"
                terms.append(f"effect of {effect}: {shown}")
            lines += ["\n  ".join(terms)] if terms else []
        return lines + self.remarks()

    def _steps(self, name: str) -> str:
        """The budget, the number of upper steps and how far these moved u, to begin a sentence."""
        if not has_upper_level(self.plan.methods[name]):
            return ""
        means, words = self._upper(name), [f"at {self.passes:g} passes"] * bool(self.passes)
        if "steps" in means:
            far = f" that moved the upper variables by {100 * means.get('moved', 0):.3g} %"
            if means.get("start") == 0:
                far = f" that moved the upper variables from 0 to a norm of {means['moved']:.2g}"
            steps = f"{means['steps']:.3g} upper step{'' if means['steps'] == 1 else 's'}"
            words.append(f"with {steps}{far * ('moved' in means)}")
        return f"{', '.join(words)}: " if words else ""

    def _edges(self) -> Iterator[str]:
        """Rates without a finite score, and chosen rates at an end of their grid."""
        for name, kind in self.plan.candidates():
            for axis, grid in self.plan.at_every_rate(self.store, name, kind).items():
                title, word = name + ABLATIONS[kind], axis.replace("_", " ")
                for rate, score in grid.items():
                    if not math.isfinite(score):
                        text = "a score is not finite, which counts as the worst"
                        yield f"{title}: at the {word} {rate:g} {text}"
                chosen = [run[axis] for run in self.reported(name, kind)]
                ends = [x for x in chosen if x in (min(grid), max(grid))]
                if 2 * len(ends) > len(chosen):
                    far = " and ".join(f"{x:g}" for x in sorted({*ends}))
                    article = "a" if axis == "rate" else "an"
                    text = f"seeds chose {article} {word} at an end of the grid, {far}"
                    yield f"{title}: {len(ends)} of {len(chosen)} {text}; give further ones"

    def remarks(self) -> list[str]:
        """Remarks on rates, rows and runs."""
        lines = [*filter(None, [self.note, self.store.remark(), *self._edges()])]
        layers: dict[str, list[str]] = {}
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

    def stopping(self) -> list[Row]:
        """The scores at the end of runs and at each seed's best point, which is shown in passes.

        The best point is that of the mean held-out score; no test row chooses it. Each effect has
        an interval of its own, and none is corrected for their number.
        """
        heads = "at the end", "stopped", "effect", f"− {self.first}, stopped", "stopped at"
        rows, first = [["method", *heads]], self.scores(self.first, stopped=True)
        for name, kind in self.plan.candidates():
            scores = self.scores(name, kind), self.scores(name, kind, stopped=True)
            gaps = [[x - y for x, y in zip(scores[1], z)] for z in (scores[0], first)]
            ends = [
                self.passes if each["stop"] is None else round(sum(each["spent"].values()))
                for each in self.reported(name, kind, True)
            ]
            cells = [*map(self.shown, scores), *(str(Verdict(x, self.in_points)) for x in gaps)]
            rows.append([name + ABLATIONS[kind], *cells, _several(ends)])
        return rows

    def spent(self) -> list[Row]:
        """The passes of each method by use, and those of the choice; means over seeds."""
        rows: list[Row] = []
        *stages, _ = self.plan.stages(self.store)
        for name, kind in self.plan.candidates():
            results = self.reported(name, kind)
            means = {key: fmean(r["spent"][key] for r in results) for key in results[0]["spent"]}
            tried = [x for runs in stages for x in runs if (x.method, x.kind) == (name, kind)]
            passes = sum(self.plan.share(self.store, run) for run in tried)
            means["choice of the rates"] = passes / len(self.plan.seeds)
            rows = rows or [["method", *means]]
            rows.append([name + ABLATIONS[kind], *(f"{x:.1f}" for x in means.values())])
        return rows

    def searched(self, groups: Mapping[str, Sequence[str]] | None = None) -> list[Row]:
        """The expected score of the best of n rates, and the passes of their runs; see `best_of`.

        Args:
            groups: by a name, methods that are one search, such as one for each value of τ; by
                default each method is one.
        """
        rows = [["method", "settings", "passes", self._score]]
        for title, names in (groups or {name: [name] for name in self.plan.methods}).items():
            for n, (passes, scores) in enumerate(best_of(self.plan, self.store, names), 1):
                rows.append([title, str(n), f"{passes:.0f}", self.shown(scores)])
        return rows

    def tables(self) -> dict[str, list[Row]]:
        """All tables by heading; rates and passes only where runs have a budget."""
        tables = {"Scores": self.table(), "Ablations": self.ablations()}
        tables["Upper level"] = self.upper_level()
        if self.passes:
            tables |= {"Held-out score at every rate": self.rates(), "Passes": self.spent()}
            if len(self.plan.endings) > 1:
                tables["Stopped where the held-out score was best"] = self.stopping()
            if len(self.plan.choice.rates) > 1 < self.plan.choice.splits:
                tables["The best of n rates"] = self.searched()
        return {title: rows for title, rows in tables.items() if len(rows) > 1}

    def heading(self) -> str:
        """The score, the rows, the budget, the intervals and the level of significance."""
        folds, tested = self.store.shared.get("folds"), f"{self.scored:,} " if self.scored else ""
        rows = f"folds of the {tested}trusted rows" if folds else f"the {tested}test rows"
        better = " (lower is better)" if self.plan.lower_is_better else ""
        text = (
            f"{self._score}{better} on {rows}, {self._budget()}; means of {len(self.plan.seeds)} "
            f"seeds with individual 95 % intervals over {self._repetitions()}"
        )
        count = len(self.plan.methods) - 1
        parts = len(self.verdicts) - count
        over = [f"{count} differences"] * (count > 1) + [f"{parts} parts"] * (parts > 1)
        holms = ", Holm's correction over " * bool(over) + " and over ".join(over)
        return f"{text}; *: significant at 5 %{holms}"

    def _budget(self) -> str:
        """What the runs have in common."""
        return f"{self.passes:g} passes a run" if self.passes else "heads at their minimum"

    def _repetitions(self) -> str:
        """What the intervals are over."""
        if self.store.shared.get("folds"):
            return "folds"
        if self.passes:
            return "seeds, on the same test rows"
        return "seeds, each with its own draw of training rows and its own part of the test rows"

    def __str__(self) -> str:
        return "\n".join([self.heading(), "", aligned(self.table()), "", *self.sentences()])

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure: the differences to the first method with their intervals.

        Args:
            path: the file to write too; its suffix, such as ``.pdf`` or ``.png``, is the format.
        """
        (first, *others), scale = self.plan.candidates(), 100 if self.in_points else 1
        gaps = {}
        for name, kind in others:
            gap = self.difference((name, kind), first)
            low, high = gap.interval
            gaps[name + ABLATIONS[kind]] = (scale * gap.estimate, scale * low, scale * high)
        title = f"{self._score} − that of {self.first}, paired, 95 % intervals"
        return intervals(gaps, path, title)

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the packages with which the runs were done."""
        return dict(self.store.shared.get("versions") or versions())

    def to_latex(
        self, ablations: bool = True, caption: str | None = None, label: str = "tab:comparison"
    ) -> str:
        """The methods' scores, differences and passes, and `ablations`, as tables of booktabs.

        Args:
            ablations: whether there is the second table.
            caption: of the first table, as LaTeX; by default the heading.
            label: of the first table; that of the second ends with ``-ablations``.
        """
        heads, *rows = self.table()
        rows = [x for x, (_, kind) in zip(rows, self.plan.candidates()) if kind == "method"]
        tables = [pandas.DataFrame(rows, columns=heads).drop(columns=NOT_PRINTED, errors="ignore")]
        heads, *rows = self.ablations()
        tables += [pandas.DataFrame(rows, columns=heads)] if ablations and rows else []
        escape, line = methodcaller("translate", LATEX), self.heading()
        made = escape(f"{line[0].upper()}{line[1:]}.")
        captions = caption or made, f"Ablations. An effect is the row above minus the row. {made}"
        texts = [f"% {', '.join(map(' '.join, self.versions.items()))}"]
        for table, text, name in zip(tables, captions, (label, f"{label}-ablations")):
            form = {"column_format": "l" + "r" * (table.shape[1] - 1), "position": "t"}
            table = table.map(escape).rename(columns=escape)
            texts.append(table.to_latex(index=False, caption=text, label=name, **form))
        return "\n".join(texts)

    def results(self) -> list[Result]:
        """The entries of all runs."""
        return [*self.store.results.values()]

    def to_csv(self, path: str | Path) -> None:
        """Write all runs, one line each, with columns such as ``metrics.eval_loss``."""
        pandas.json_normalize(self.results()).to_csv(path, index=False)


def _marked(verdict: Verdict) -> str:
    return f"{verdict}{'*' * verdict.is_significant}"


def _several(rates: Iterable[float | None]) -> str:
    """The median and, where they differ, the range."""
    known = sorted(rate for rate in rates if rate is not None)
    if not known or known[0] == known[-1]:
        return f"{known[0]:g}" if known else ""
    return f"{median(known):.4g} ({known[0]:.4g}–{known[-1]:.4g})"
