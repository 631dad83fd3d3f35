"""Writes the pages' tables, sentences and figures from the stores.

A part of a page without complete runs stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks import pages
from benchmarks.measure import table
from benchmarks.methods import calibration
from benchmarks.methods.runs import stored
from benchmarks.methods.settings import SETTINGS, Setting
from hyperopt_peft.comparison import Comparison
from hyperopt_peft.comparison.budgets import AcrossBudgets
from hyperopt_peft.comparison.search import best_of
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.utils.plots import lines
from hyperopt_peft.utils.verdict import Verdict

TABLES = pages.RESULTS / "methods.md"
FIGURE, SEARCH, PAGE = (pages.DOCS / f"{x}.png" for x in ("methods", "search", "results"))
#: The settings on BiDoRA's page.
OF_PAGE = ("magnitudes, all rows", "magnitudes, 300 rows")
#: What a grid costs, and what a learned number does.
GRIDS = (
    "A search trains each of its settings (rates, and values of the number) and keeps the one with "
    "the best score on one held-out part; the others score it, so that no test row is read. *A "
    "random one* is a single training at one of the settings."
)
#: What the numbers on BiDoRA's page are.
ADAPTED = (
    "Points of Matthews correlation (CoLA), accuracy (SST-2, tweets) and micro-F1 without O "
    "(BC5CDR), ± half of a 95 % interval over the seeds. The model is MiniLM with an adapter of "
    "rank 8 in all linear layers. A pass is one forward and backward over 16 rows. Up to 128 upper "
    "rows were one batch, the default until version 0.5.0. A *stopped* run ends where its score on "
    "held-out rows was best."
)
#: What the numbers are.
UNITS = (
    "Points of accuracy (rare classes: mean F1 of the classes), ± half of a 95 % interval over the "
    "seeds. The model is MiniLM with the adapter in its last layer. A pass is one forward and "
    "backward over 8 rows. A *stopped* run ends where its score on held-out rows was best. *Heads* "
    "are on frozen features, with the lower level solved. The figure has scores on held-out "
    "rows: 20 to 40, more for rare classes. Up to 128 upper rows were one batch, the default until "
    "version 0.5.0 (rare classes: 64). The tasks have [few rows](../benchmarks/results/methods.md)."
)
#: What a name of the tables means in a sentence.
WORDS = {
    "LayerDecay, one for all layers": "`LayerDecay(shared=True)`",
    "logit adjustment, τ learned": "`TunedAdjustment`",
    "LoRA, weight decay 0.1": "a weight decay of 0.1",
    "least suspicion, trusted rows 10 times": "to leave out the labels that cross-validation "
    "doubts most, and to repeat the trusted rows ten times",
    "least trusted loss": "to leave out the labels that a head on the trusted rows doubts most",
    "loss correction by source": "to count on trusted rows how each source confuses the labels, "
    "and to correct the loss by these counts",
    "logit adjustment": "to add the logarithm of each class's share to its logit in training",
    "logit adjustment, τ = 1.5": "to add 1.5 times the logarithm of each class's share to its "
    "logit in training",
}
Row = dict[str, str]
Candidate = tuple[str, Kind]
Searches = dict[str, list[tuple[float, list[float]]]]


@dataclass(frozen=True)
class Found:
    """The complete runs of a setting: adapters by task, and heads by task."""

    name: str
    setting: Setting
    adapters: Mapping[str, AcrossBudgets]
    heads: Mapping[str, Comparison]

    @property
    def by_name(self) -> bool:
        """Whether sentences name each simple way: on BiDoRA's page, and if there is one alone."""
        return self.name in OF_PAGE or len(self.simple) == 1

    @property
    def simple(self) -> list[str]:
        """The simple ways, the best one by held-out rows first, as a user would choose.

        By the mean over tasks at the largest budget; the first method, with which all are compared,
        comes last.
        """
        first = next(iter(self.adapters.values())).first
        names = [x for x in self.methods if x not in (*self.setting.papers, first)]
        ends = {name: held_out_curve(self, (name, "method"))[1][-1] for name in names}
        return [*sorted(names, key=lambda name: -ends[name]), first]

    @property
    def methods(self) -> list[str]:
        """Those that have all runs on each task."""
        first, *others = self.adapters.values()
        return [x for x in first.plan.methods if all(x in y.plan.methods for y in others)]

    def candidates(self) -> list[Candidate]:
        """The best simple way first, then the others, and each bilevel method with its ablation."""
        order = [*self.simple, *(x for x in self.setting.papers if x in self.methods)]
        kinds = next(iter(self.adapters.values())).plan.candidates()
        return [pair for name in order for pair in kinds if pair[0] == name]


def report(*, check: bool) -> None:
    """Write the tables between the marks of the pages, and the figures.

    Raises:
        SystemExit: with ``check``, if a page would change; nothing is written then.
    """
    every = [found for name in SETTINGS if (found := complete(name))]
    kinds = [each for each in every if each.name not in OF_PAGE]
    page = [each for each in every if each.name in OF_PAGE]
    grids = {f"{x.name}, {task}": found for x in kinds for task, found in searches(x).items()}
    parts = {
        pages.DOCS / "results.md": {
            "magnitudes": joined(ADAPTED, map(section, page), "results.png")
        },
        pages.DOCS / "methods.md": {"kinds": joined(UNITS, map(section, kinds), "methods.png")},
        pages.ROOT / "README.md": {"methods": "\n".join(map(line, kinds))},
        TABLES: {"methods": "\n".join(map(details, every))},
        pages.DOCS / "when-bilevel-pays.md": {
            "grid": joined(
                GRIDS, [f"{table([*search_rows(grids)])}\n"] if grids else [], "search.png"
            ),
        },
        pages.RESULTS / "calibration.md": {
            name: f"{table(rows)}\n" for name, rows in calibration.tables().items()
        },
    }
    for path, sections in parts.items():
        given = {name: text for name, text in sections.items() if text}
        pages.write(path, given, check=check)
    if not check:
        figures(kinds, page, grids)


def joined(begin: str, texts: Iterable[str], figure: str = "") -> str:
    """``begin``, ``texts`` and a link to a figure; nothing without texts."""
    link = [f"![Score against passes]({figure})\n"] if figure else []
    return "\n".join([f"{begin}\n", *every, *link]) if (every := [*texts]) else ""


def section(found: Found) -> str:
    """The table of a setting, its sentences, and what was not run."""
    text = f"{measured(found)}\n"
    if found.heads:
        solved = differences(found, found.heads, "the simple way")
        text += f"\nWith heads ({' and '.join(found.heads)}) {solved}\n"
    missing = [name for name in found.setting.methods() if name not in found.methods]
    missing += [task for task in found.setting.tasks if task not in found.adapters]
    end = f"\nNot run: {', '.join(missing)}.\n" if missing else ""
    return f"### {found.name.capitalize()}\n\n{table(scores(found))}\n\n{text}{end}"


def line(found: Found) -> str:
    """What adapters show of a setting, as one item of a list."""
    return f"- **{found.name.capitalize()}** ({' and '.join(found.adapters)}). {measured(found)}"


def measured(found: Found) -> str:
    """The best simple way of adapters, and the differences at the end of their runs."""
    best, every = found.simple[0], {task: x.last for task, x in found.adapters.items()}
    way = f"The simple way with the best held-out score is {WORDS.get(best, f'*{best}*')}. "
    passes = next(iter(every.values())).plan.passes
    text = f"At {passes:,g} passes {differences(found, every, 'it')}"
    return text if found.by_name else way + text


def differences(found: Found, every: Mapping[str, Comparison], best_way: str) -> str:
    """What the best simple way adds to the first method, and bilevel ones to their frozen forms.

    In points, on each of the tasks ``every``.
    """
    best, first = found.simple[0], found.simple[-1]
    others: dict[str, dict[str, Candidate]] = {}
    if best != first:
        others[best] = {first: (first, "method")}
    rivals: dict[str, Candidate] = {"the simple way": (best, "method")}
    if found.by_name:
        rivals = {name: (name, "method") for name in reversed(found.simple)}
    for name in found.setting.papers:
        others[name] = {"its frozen form": (name, "frozen"), **rivals}
    texts = []
    for name, known in others.items():
        gaps = []
        for text, other in known.items():
            pair = (name, "method"), other
            values = [paired(x, *pair) for x in every.values() if {*pair} <= {*x.plan.candidates()}]
            if values:
                gaps.append(f"from {text} by {' and '.join(values)} points")
        who = WORDS.get(name, f"`{name}`") if found.by_name or name != best else best_way
        texts += [f"{who} differs {', and '.join(gaps)}."] if gaps else []
    return " ".join(texts)


def complete(name: str) -> Found | None:
    """The tasks of a setting whose first method has all runs; None without one."""
    setting = SETTINGS[name]
    by_kind = [
        {task: each for task in setting.tasks if (each := stored(name, task, heads))}
        for heads in ((False, True) if setting.heads else (False,))
    ]
    adapters, heads = by_kind[0], by_kind[-1] if setting.heads else {}
    return Found(name, setting, adapters, heads) if adapters else None


def scores(found: Found) -> list[Row]:
    """The scores in points with intervals over seeds: a row for each task and candidate.

    The passes are a seed's at the largest budget, with those of the runs that chose its rates.
    """
    rows = []
    for task, each in found.adapters.items():
        heads, (_, *every) = found.heads.get(task), each.last.spent()
        spent = {title: sum(map(float, cells)) for title, *cells in every}
        for name, kind in found.candidates():
            row = {"task": task, "method": name + ABLATIONS[kind]}
            for passes, x in each.comparisons.items():
                for stopped in x.plan.endings:
                    head = f"{passes:g} passes{', stopped' * stopped}"
                    row[head] = points(x.scores(name, kind, stopped))
            if found.heads:
                known = heads and (name, kind) in heads.plan.candidates()
                row["heads, solved"] = points(heads.scores(name, kind)) if known else "–"
            row["passes with the choice"] = f"{spent[name + ABLATIONS[kind]]:,.0f}"
            rows.append(row)
    return rows


def points(values: Iterable[float], sign: str = "") -> str:
    """Mean ± half of the interval, in percentage points."""
    return Verdict(values, points=True).shown(sign)


def paired(comparison: Comparison, one: Candidate, other: Candidate) -> str:
    """The difference of two candidates at the end of their runs, paired by seed."""
    both = (comparison.scores(*each, False) for each in (one, other))
    return points((x - y for x, y in zip(*both, strict=True)), "+")


def searches(found: Found) -> dict[str, Searches]:
    """By task and grid, the passes and scores of the best of n settings; see `best_of`."""
    grids = {
        name: grid
        for name, grid in found.setting.grids.items()
        if all(method in found.methods for method in grid)
    }
    return {
        task: {name: best_of(x.last.plan, x.last.store, grid) for name, grid in grids.items()}
        for task, x in found.adapters.items()
        if grids
    }


def search_rows(every: Mapping[str, Searches]) -> Iterator[Row]:
    """For each grid, one of its settings and the best of all, and the passes of their runs."""
    for problem, grids in every.items():
        for name, curve in grids.items():
            (one, first), (all_runs, last) = curve[0], curve[-1]
            row = {"problem": problem, "way": name, "settings": str(len(curve))}
            row |= {"a random one": points(first), "passes": f"{one:,.0f}"}
            yield {
                **row,
                "the best by held-out rows": points(last),
                "passes of all": f"{all_runs:,.0f}",
            }


def figures(
    kinds: Sequence[Found], page: Sequence[Found], searched: Mapping[str, Searches]
) -> None:
    """Held-out score within a run for each kind of problem and for BiDoRA, and the searches."""
    for path, every in {FIGURE: kinds, PAGE: page}.items():
        if panels := dict(map(panel, every)):
            lines(panels, path, xlabel="passes", ylabel="held-out score (points)")
    panels = {
        problem: {
            name: ([passes for passes, _ in curve], [100 * fmean(values) for _, values in curve])
            for name, curve in grids.items()
        }
        for problem, grids in searched.items()
    }
    if panels:
        lines(panels, SEARCH, xlabel="passes of all trainings", ylabel="score (points)")


def panel(found: Found) -> tuple[str, dict[str, Any]]:
    """The mean held-out score over seeds and tasks within the runs of the largest budget."""
    best, first = found.simple[0], found.simple[-1]
    paper = next((x for x in found.setting.papers if x in found.methods), "")
    shown: dict[str, Candidate] = {
        first: (first, "method"),
        "best simple way": (best, "method"),
        "bilevel method": (paper, "method"),
        "its upper level frozen": (paper, "frozen"),
    }
    if best == first:
        del shown["best simple way"]
    pairs = {name: pair for name, pair in shown.items() if pair in found.candidates()}
    title = f"{found.name}: {'; '.join(filter(None, (best, paper)))}"
    return title, {name: held_out_curve(found, pair) for name, pair in pairs.items()}


def held_out_curve(found: Found, candidate: Candidate) -> tuple[list[float], list[float]]:
    """The points of a run, and the mean held-out score at each of them.

    A frozen form has held-out scores only at the rates of its best point.
    """
    stopped = candidate[1] == "frozen"
    chosen = [
        (x.last, x.last.plan.chosen(x.last.store, *candidate, seed, stopped))
        for x in found.adapters.values()
        for seed in x.last.plan.seeds
    ]
    curves = [x.plan.curve(x.store, replace(run, stop=None)) for x, run in chosen]
    means = [fmean(score for _, score in point) for point in zip(*curves, strict=True)]
    return [passes for passes, _ in curves[0]], [100 * mean for mean in means]


def details(found: Found) -> str:
    """All tables and sentences of a setting, by task."""
    texts = [f"### {found.name.capitalize()}\n"]
    solved = {f"{task}, heads": each for task, each in found.heads.items()}
    for task, each in {**found.adapters, **solved}.items():
        texts.append(f"#### {found.name.capitalize()}: {task}\n\n{each.heading()}.\n")
        for title, (heads, *rows) in each.tables().items():
            cells = [dict(zip(heads, row, strict=True)) for row in rows]
            texts.append(f"**{title}**\n\n{table(cells)}\n")
        lines_of = (text.replace("\n  ", "\n  - ") for text in each.sentences())
        texts += ["\n".join(f"- {text}" for text in lines_of), ""]
    return "\n".join(texts)
