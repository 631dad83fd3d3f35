"""Writes the pages' tables, sentences and figures from the stores.

A part of a page without complete runs stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pandas

from benchmarks import pages
from benchmarks.measure import table
from benchmarks.methods import calibration
from benchmarks.methods.runs import stored
from benchmarks.methods.settings import SETTINGS, Setting
from hyperopt_peft.comparison import Comparison
from hyperopt_peft.comparison.result import Candidate
from hyperopt_peft.comparison.task import ABLATIONS, Kind
from hyperopt_peft.utils.plots import lines

TABLES = pages.RESULTS / "methods.md"
FIGURE, PAGE = (pages.DOCS / f"{x}.png" for x in ("methods", "results"))
#: The settings on BiDoRA's page.
OF_PAGE = ("magnitudes, all rows", "magnitudes, 300 rows")
#: What a name of the tables means in a sentence.
WORDS = {
    "LayerDecay, one for all layers": "`LayerDecay(shared=True)`",
    "logit adjustment, τ learned": "`TunedAdjustment`",
    "LoRA, weight decay 0.1": "a weight decay of 0.1",
    "least suspicion, trusted rows 10 times": "to leave out the labels that cross-validation "
    "doubts most, and to repeat the trusted rows ten times",
    "loss correction by source": "to count on trusted rows how each source confuses the labels, "
    "and to correct the loss by these counts",
    "logit adjustment, τ = 1.5": "to add 1.5 times the logarithm of each class's share to its "
    "logit in training",
}
FROZEN = ABLATIONS["frozen"]
#: The tables of `Comparison.tables` that are in the results.
PRINTED = ("Scores", "Held-out score at every rate")


@dataclass(frozen=True)
class Found:
    """The complete runs of a setting: adapters by task and budget, and heads by task."""

    name: str
    setting: Setting
    adapters: Mapping[str, Mapping[float, Comparison]]
    heads: Mapping[str, Comparison]

    @property
    def longest(self) -> dict[str, Comparison]:
        """The comparison of adapters at the largest budget, by task."""
        return {task: each[max(each)] for task, each in self.adapters.items()}

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
        first, *others = [x for x in self.methods if x not in self.setting.papers]
        ends = {name: held_out_curve(self, name)[1][-1] for name in others}
        return [*sorted(others, key=lambda name: -ends[name]), first]

    @property
    def methods(self) -> list[str]:
        """Those that have all runs on each task."""
        first, *others = self.longest.values()
        return [x for x in first.plan.methods if all(x in y.plan.methods for y in others)]

    @property
    def titles(self) -> list[str]:
        """The best simple way first, then the others, and each bilevel method with its ablation."""
        known = next(iter(self.longest.values())).scores()
        order = [*self.simple, *(x for x in self.setting.papers if x in self.methods)]
        return [each for name in order for each in (name, name + FROZEN) if each in known]


def report(*, check: bool) -> None:
    """Write the tables between the marks of the pages, and the figures.

    Raises:
        SystemExit: with ``check``, if a page would change; nothing is written then.
    """
    every = [found for name in SETTINGS if (found := complete(name))]
    kinds = [each for each in every if each.name not in OF_PAGE]
    page = [each for each in every if each.name in OF_PAGE]
    written = {
        pages.DOCS / "results.md": {"magnitudes": "\n".join(map(section, page))},
        pages.DOCS / "methods.md": {"kinds": "\n".join(map(section, kinds))},
        pages.ROOT / "README.md": {"methods": "\n".join(map(line, kinds))},
        TABLES: {"methods": "\n".join(map(details, every))},
        pages.RESULTS / "calibration.md": {
            name: f"{table(rows)}\n" for name, rows in calibration.tables().items()
        },
    }
    for path, sections in written.items():
        pages.write(path, {name: text for name, text in sections.items() if text}, check=check)
    for path, shown in {} if check else {FIGURE: kinds, PAGE: page}.items():
        if panels := dict(map(panel, shown)):
            lines(panels, path, xlabel="passes", ylabel="held-out score (points)")


def section(found: Found) -> str:
    """The table of a setting, and its sentences."""
    text = f"### {found.name.capitalize()}\n\n{markdown(scores(found))}\n\n{measured(found)}\n"
    if found.heads:
        solved = differences(found, found.heads, "the simple way")
        text += f"\nWith heads ({' and '.join(found.heads)}) {solved}\n"
    return text


def line(found: Found) -> str:
    """What adapters show of a setting, as one item of a list."""
    return f"- **{found.name.capitalize()}** ({' and '.join(found.adapters)}). {measured(found)}"


def measured(found: Found) -> str:
    """The best simple way of adapters, and the differences at the end of their runs."""
    best, passes = found.simple[0], max(next(iter(found.adapters.values())))
    way = f"The simple way with the best held-out score is {WORDS.get(best, f'*{best}*')}. "
    text = f"At {passes:,g} passes {differences(found, found.longest, 'it')}"
    return text if found.by_name else way + text


def differences(found: Found, every: Mapping[str, Comparison], best_way: str) -> str:
    """What the best simple way adds to the first method, and bilevel ones to their frozen forms.

    In points, on each of the tasks ``every``.
    """
    best, first = found.simple[0], found.simple[-1]
    rivals = {"the simple way": best}
    if found.by_name:
        rivals = {name: name for name in reversed(found.simple)}
    others = {} if best == first else {best: {first: first}}
    for name in found.setting.papers:
        others[name] = {"its frozen form": name + FROZEN, **rivals}
    texts = []
    for name, rivals_of in others.items():
        gaps = []
        for text, other in rivals_of.items():
            known = [(x, candidates(x)) for x in every.values()]
            pairs = [(x, y[name], y[other]) for x, y in known if name in y and other in y]
            if values := [str(x.difference(*pair)) for x, *pair in pairs]:
                gaps.append(f"from {text} by {' and '.join(values)} points")
        who = WORDS.get(name, f"`{name}`") if found.by_name or name != best else best_way
        if gaps:
            texts.append(f"{who} differs {', and '.join(gaps)}.")
    return " ".join(texts)


def complete(name: str) -> Found | None:
    """The tasks of a setting whose first method has all runs; None without one."""
    setting = SETTINGS[name]
    adapters = {task: each for task in setting.tasks if (each := stored(name, task))}
    heads = {task: stored(name, task, heads=True) for task in setting.tasks if setting.heads}
    solved = {task: each[0.0] for task, each in heads.items() if each}
    return Found(name, setting, adapters, solved) if adapters else None


def scores(found: Found) -> pandas.DataFrame:
    """The scores in points at the largest budget, with intervals.

    A row for each task and candidate.
    """
    tables = {}
    for task, x in found.longest.items():
        passes = f"{x.plan.passes:,g} passes"
        columns = {passes: means(x), f"{passes}, stopped": means(x, stopped=True)}
        if found.heads:
            columns["heads, solved"] = means(found.heads[task]) if task in found.heads else {}
        tables[task] = pandas.DataFrame(columns).reindex(found.titles).fillna("–")
    return pandas.concat(tables, names=["task", "method"]).reset_index()


def candidates(found: Comparison) -> dict[str, Candidate]:
    """The methods and ablations by the names that tables have."""
    return {found.title(*each): each for each in found.plan.candidates()}


def means(found: Comparison, stopped: bool = False) -> dict[str, str]:
    """Mean ± half of the interval of each method and ablation."""
    return {name: found.mean(x, stopped).shown() for name, x in candidates(found).items()}


def markdown(rows: pandas.DataFrame) -> str:
    """A table of a page."""
    return table(rows.to_dict("records"))


def panel(found: Found) -> tuple[str, dict[str, Any]]:
    """The mean held-out score over seeds and tasks within the runs of the largest budget."""
    best, first = found.simple[0], found.simple[-1]
    paper = next((x for x in found.setting.papers if x in found.methods), "")
    shown: dict[str, tuple[str, Kind]] = {first: (first, "method")}
    if best != first:
        shown["best simple way"] = best, "method"
    if paper:
        shown["bilevel method"] = paper, "method"
    if paper + FROZEN in found.titles:
        shown["its upper level frozen"] = paper, "frozen"
    names = "; ".join(name for name in (best, paper) if name)
    return f"{found.name}: {names}", {x: held_out_curve(found, *y) for x, y in shown.items()}


def held_out_curve(
    found: Found, name: str, kind: Kind = "method"
) -> tuple[list[float], list[float]]:
    """The points of a run, and the mean held-out score at each of them.

    A frozen form has held-out scores only at the rates of its best point.
    """
    curves = []
    for x in found.longest.values():
        for seed in x.plan.seeds:
            run = x.plan.chosen(x.store, name, kind, seed, kind == "frozen")
            curves.append(x.plan.curve(x.store, replace(run, stop=None)))
    means = [fmean(score for _, score in point) for point in zip(*curves, strict=True)]
    return [passes for passes, _ in curves[0]], [100 * mean for mean in means]


def details(found: Found) -> str:
    """The tables and sentences of a setting, by task and budget."""
    every = {
        f"{task}, {passes:g} passes": x
        for task, each in found.adapters.items()
        for passes, x in each.items()
    }
    every |= {f"{task}, heads": each for task, each in found.heads.items()}
    texts = [f"### {found.name.capitalize()}\n"]
    for title, each in every.items():
        texts.append(f"#### {found.name.capitalize()}: {title}\n\n{each.heading()}.\n")
        tables = each.tables()
        texts += [f"**{x}**\n\n{markdown(tables[x])}\n" for x in PRINTED if x in tables]
        lines_of = (text.replace("\n  ", "\n  - ") for text in each.sentences())
        texts += ["\n".join(f"- {text}" for text in lines_of), ""]
    return "\n".join(texts)
